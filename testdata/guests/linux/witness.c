/* The quick witness, process 1 of a guest whose save and restore are timed: `witness FILE` says `tick N` a hundred times a
   second, and `sum HEX`, a checksum of FILE, once at the start and for each line `sum` that it is sent. Between ticks the
   guest is idle. */
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { TICK_NS = 10 * 1000 * 1000 };

static const char *file;

/* One write for a line, so that lines of two processes never mix. */
static void say(const char *what, const char *format, unsigned long long value)
{
    char line[64];
    int len = snprintf(line, sizeof line, "%s ", what);
    len += snprintf(line + len, sizeof line - (size_t)len, format, value);
    if (write(STDOUT_FILENO, line, (size_t)len) != len)
        _exit(1);
}

/* In a process of its own: ticks go on meanwhile. Every word depends on all before it, so order counts too. */
static void say_sum(void)
{
    if (fork() != 0)
        return;
    uint64_t sum = 0xcbf29ce484222325;
    struct stat stat;
    int fd = open(file, O_RDONLY);
    if (fd < 0 || fstat(fd, &stat) != 0)
        _exit(1);
    size_t words = (size_t)stat.st_size / sizeof(uint64_t);
    const uint64_t *word = mmap(NULL, (size_t)stat.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (word == MAP_FAILED) {
        puts("sum BAD: no memory to look at");
        _exit(1);
    }
    for (size_t i = 0; i < words; i++) {
        sum = (sum ^ word[i]) * 0x9e3779b97f4a7c15;
        sum ^= sum >> 29;
    }
    say("sum", "%016llx\n", sum);
    _exit(0);
}

int main(int argc, char **argv)
{
    char asked[64];
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};

    if (argc < 2)
        return 1;
    file = argv[1];
    int tty = open("/dev/ttyS0", O_RDONLY | O_NOCTTY);
    dup2(tty, STDIN_FILENO);
    say_sum();
    for (unsigned long long tick = 1;; tick++) {
        say("tick", "%llu\n", tick);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        if (poll(&input, 1, 0) > 0 && read(STDIN_FILENO, asked, sizeof asked) >= 3 && memcmp(asked, "sum", 3) == 0)
            say_sum();
        struct timespec pause = {.tv_nsec = TICK_NS};
        nanosleep(&pause, NULL);
    }
}
