/* The restless witness, process 1 of a guest that is saved while it runs: `writer MIB` writes to every page of MIB MiB, in
   an order that jumps about, again and again, and says `tick N` ten times a second.

   In pass G every page gets the number G. Before a page is written it must hold G - 1, at its beginning and at its end:
   so a memory put together from two moments is found, at the latest one pass after it was restored. Then it says
   `writer BAD`. At the end of a pass it says `pass G` if a second went by since it said so. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t) };

static unsigned long long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long long)now.tv_sec * 1000 + (unsigned long long)now.tv_nsec / 1000000;
}

static void say(const char *what, unsigned long long value)
{
    char line[64];
    int len = snprintf(line, sizeof line, "%s %llu\n", what, value);
    if (write(STDOUT_FILENO, line, (size_t)len) != len)
        _exit(1);
}

int main(int argc, char **argv)
{
    uint64_t pages = (argc > 1 ? strtoull(argv[1], NULL, 10) : 16) * 256;
    volatile uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned long long tick = 0, next_tick = 0, next_pass = 0;
    /* Odd and no divisor of a number of pages that is a multiple of 256: every page comes once in a pass. */
    const uint64_t step = 8191;

    if (memory == MAP_FAILED) {
        puts("writer BAD: no memory");
        return 1;
    }
    for (uint64_t page = 0; page < pages; page++)
        for (uint64_t word = 1; word < WORDS - 1; word++)
            memory[page * WORDS + word] = (page * WORDS + word) * 0x9e3779b97f4a7c15;
    for (uint64_t pass = 1;; pass++) {
        uint64_t page = 0;
        for (uint64_t count = 0; count < pages; count++) {
            volatile uint64_t *words = memory + page * WORDS;
            if (words[0] != pass - 1 || words[WORDS - 1] != pass - 1) {
                printf("writer BAD: pass %llu, page %llu holds %llu and %llu\n", (unsigned long long)pass,
                       (unsigned long long)page, (unsigned long long)words[0], (unsigned long long)words[WORDS - 1]);
                fflush(stdout);
                return 1;
            }
            words[0] = pass;
            words[WORDS - 1] = pass;
            page = (page + step) % pages;
            if (count % 1024 == 0 && now_ms() >= next_tick) {
                say("tick", ++tick);
                next_tick = now_ms() + 100;
            }
        }
        if (now_ms() >= next_pass) {
            say("pass", pass);
            next_pass = now_ms() + 1000;
        }
    }
}
