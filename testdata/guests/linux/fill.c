/* Writes `fill MIB` MiB to stdout, always the same: 64 KiB that do not compress, 64 KiB of text, and so on;
   `fill MIB random`: nothing that compresses. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RUN = 64 * 1024, RUNS_PER_MIB = 16 };

static uint64_t state = 0x76b5a2d0c3f49e17;

/* xorshift64* */
static uint64_t next(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
}

static void write_all(const char *from, size_t len)
{
    while (len > 0) {
        ssize_t done = write(STDOUT_FILENO, from, len);
        if (done < 0)
            exit(1);
        from += done;
        len -= (size_t)done;
    }
}

int main(int argc, char **argv)
{
    static char run[RUN + 1] __attribute__((aligned(8))); /* snprintf ends its last line with a zero */
    long runs = (argc > 1 ? atol(argv[1]) : 1) * RUNS_PER_MIB;
    int is_random = argc > 2 && strcmp(argv[2], "random") == 0;

    for (long i = 0; i < runs; i++) {
        if (is_random || i % 2 == 0)
            for (size_t at = 0; at < RUN; at += 8)
                *(uint64_t *)(run + at) = next();
        else
            for (size_t at = 0; at < RUN; at += 32)
                snprintf(run + at, 33, "run %10ld, byte %10zu\n", i, at);
        write_all(run, RUN);
    }
    return 0;
}
