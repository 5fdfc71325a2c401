; The counter guest: one boot sector that fills its memory, counts on COM1 and keeps looking at its memory.
;
; It boots as a disk or as a floppy on any x86 PC with a BIOS and prints
;
;     vmstow counter guest: 64 MiB
;     tick 1 memory ok
;     tick 2 memory ok                        one line each 100 ms of guest time, for ever
;     tick 3 memory BAD at 0x240000           the first wrong dword of what this tick looked at
;
; What it keeps in memory, and what a tick looks at before its line is printed:
;
;   0x140000..0x150000    stamps: the first dword of each of these 16 pages is the number of the last tick, all are
;                         checked each tick and then written anew, so pages of different moments do not go together
;   0x200000..end of RAM  dwords that follow from their address: zero where bits 18 or 19 of the address are set, so
;                         that three in four regions of 256 KiB are zero pages, else a hash of address and seed; a
;                         tick checks the next 4 MiB, so 64 MiB are through in 16 ticks
;
; The end of RAM is what int 0x15, ax = 0xe801 says, at most 3 GiB and a bit. The seed is the dword at offset 506 of
; the sector. Between ticks the processor sleeps in hlt; the PIT wakes it twenty times a second.
;
; All has to fit into the sector, hence what is taken from SeaBIOS as it is (A20 is open, the PIC maps the timer to
; vector 8) and from QEMU (the serial port needs no baud rate), and the variables behind ebp.
;
; build.sh makes counter.img from this: the sector, then zeros up to the smallest disk that SeaBIOS boots.

        org     0x7c00
        bits    16

SERIAL  equ     0x3f8
STAMPS  equ     0x140000
STAMPED equ     0x150000
PATTERN equ     0x200000
SLICE   equ     0x400000
STACK   equ     0x7000                  ; not in the page of the code: TCG watches what writes there
DIVISOR equ     59659                   ; of the PIT's 1193182 Hz: 20 Hz

; Variables, where the BIOS leaves memory to us.
VARS    equ     0x600                   ; what ebp holds
%define ram_end ebp + 0                 ; the first byte that is not RAM
%define tick    ebp + 4                 ; the number of the last line
%define next    ebp + 8                 ; where the next slice begins
%define wakes   ebp + 12                ; timer interrupts since the last tick

start:  cli
        xor     ebp, ebp
        mov     ds, bp
        mov     ss, bp
        mov     esp, STACK
        mov     bp, VARS

        mov     ax, 0xe801              ; -> dx: blocks of 64 KiB from 16 MiB on
        int     0x15
        shl     edx, 16
        add     edx, 0x1000000
        mov     [ram_end], edx

        lgdt    [gdt.register]
        lidt    [idt.register]
        mov     ax, 1
        lmsw    ax
        jmp     8:protected

        bits    32
protected:
        push    16
        pop     eax
        mov     ds, eax
        mov     ss, eax

        mov     al, 0xfe                ; only the timer may interrupt
        out     0x21, al
        mov     al, 0xff
        out     0xa1, al
        mov     al, 0x34                ; counter 0 of the PIT, rate generator
        out     0x43, al
        mov     al, DIVISOR & 0xff
        out     0x40, al
        mov     al, DIVISOR >> 8
        out     0x40, al

        mov     esi, text.hello
        call    print
        push    10
        pop     ebx                     ; the base of printed numbers
        mov     eax, [ram_end]
        add     eax, 0xfffff            ; the BIOS keeps a little at the end for itself
        shr     eax, 20
        call    number
        call    print                   ; esi stands on text.mib

        and     dword [tick], 0
        mov     edi, STAMPS             ; the stamps are zero like the regions around them
.fill:  call    expected
        cmp     eax, [edi]              ; most is zero already and not written to, so that its pages stay unused
        je      .filled
        mov     [edi], eax
.filled:
        add     edi, 4
        cmp     edi, [ram_end]
        jb      .fill

first:  mov     edi, PATTERN
sleep:  mov     [next], edi
        and     dword [wakes], 0
        sti
.hlt:   hlt
        cmp     byte [wakes], 2
        jb      .hlt
        cli

        mov     esi, text.tick
        call    print
        mov     eax, [tick]
        inc     eax
        call    number
        call    print                   ; esi stands on text.memory

        mov     edi, STAMPS
        mov     eax, [tick]
        inc     dword [tick]
.stamp: cmp     eax, [edi]
        jne     bad
        inc     dword [edi]
        add     edi, 4096
        cmp     edi, STAMPED
        jb      .stamp

        mov     edi, [next]
        lea     ecx, [edi + SLICE]
.check: call    expected
        cmp     eax, [edi]
        jne     bad
        add     edi, 4
        cmp     edi, [ram_end]
        jae     .good
        cmp     edi, ecx
        jb      .check
.good:  call    print                   ; esi stands on text.ok
        cmp     edi, [ram_end]
        jb      sleep
        jmp     first

bad:    mov     esi, text.bad
        call    print
        mov     eax, edi
        mov     bl, 16
        call    number
        mov     bl, 10
        mov     edi, [next]             ; the same slice again: it stays bad
        call    print                   ; esi stands on text.newline
        jmp     sleep

; edi: address of a dword -> eax: what must be there; edx is lost.
expected:
        xor     eax, eax
        test    edi, 0xc0000
        jnz     .done
        mov     eax, [seed]
        xor     eax, edi
        imul    eax, eax, 0x9e3779b1
        mov     edx, eax
        shr     edx, 15
        xor     eax, edx
        imul    eax, eax, 0x85ebca77
.done:  ret

; eax: number, ebx: base -> its digits are printed; eax and edx are lost.
number: xor     edx, edx
        div     ebx
        push    edx
        test    eax, eax
        jz      .digit
        call    number
.digit: pop     eax
        cmp     al, 10                  ; 0..15 -> '0'..'9', 'A'..'F'
        sbb     al, 0x69
        das

; al: a character -> sent; eax and edx are lost.
send:   mov     ah, al
        mov     edx, SERIAL + 5
.full:  in      al, dx
        test    al, 0x20
        jz      .full
        mov     al, ah
        mov     dl, SERIAL & 0xff
        out     dx, al
        ret

; esi: text that ends with a zero byte -> sent, esi behind that byte; eax and edx are lost.
print:  lodsb
        test    al, al
        jz      expected.done
        call    send
        jmp     print

on_timer:
        inc     dword [wakes]           ; ebp never changes
        push    eax
        mov     al, 0x20                ; end of interrupt
        out     0x20, al
        pop     eax
        iret

gdt:                                    ; the first descriptor is never looked at, so its place is used
.register:
        dw      3 * 8 - 1
        dd      gdt
        dw      0
        dq      0x00cf9a000000ffff      ; 8: code, 16: data, both all of 4 GiB
        dq      0x00cf92000000ffff

timer_gate:                             ; vector 8, the only one that ever comes
        dw      on_timer, 8, 0x8e00, 0
idt:
.register:
        dw      9 * 8 - 1
        dd      timer_gate - 8 * 8

text:
.hello: db      'vmstow counter guest: ', 0
.mib:   db      ' MiB', 10, 0
.tick:  db      'tick ', 0
.memory: db     ' memory ', 0
.ok:    db      'ok', 10, 0
.bad:   db      'BAD at 0x', 0
.newline: db    10, 0

        times   506 - ($ - $$) db 0
seed:   dd      0x73746f77
        dw      0xaa55
