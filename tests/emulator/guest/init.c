/* The only process of the emulated machine: runs /run/command and powers off.  Statically linked. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Bochs ends when this word is written to port 0x8900. */
static void power_off(void) {
  if (iopl(3) == 0)
    for (const char *p = "Shutdown"; *p; ++p) outb((unsigned char)*p, 0x8900);
  for (;;) pause();
}

/* /run/command holds the arguments, each ended by a zero byte. */
static char **read_command(void) {
  static char buffer[65536];
  static char *arguments[1024];
  int fd = open("/run/command", O_RDONLY);
  ssize_t size = fd < 0 ? -1 : read(fd, buffer, sizeof buffer - 1);
  int n = 0;
  for (char *p = buffer; size > 0 && p < buffer + size && n < 1023; p += strlen(p) + 1)
    arguments[n++] = p;
  return n ? arguments : NULL;
}

static void open_serial(void) {
  int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY);
  if (fd < 0) return;
  for (int i = 0; i < 3; ++i) dup2(fd, i);
}

int main(void) {
  mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
  mount("proc", "/proc", "proc", 0, NULL);
  mount("tmpfs", "/tmp", "tmpfs", 0, NULL);
  open_serial();
  char **command = read_command();
  if (!command) {
    printf("@@BOCHS-ERROR no command: %s@@\n", strerror(errno));
    fflush(stdout);
    power_off();
  }
  printf("@@BOCHS-BEGIN@@\n");
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    setenv("PATH", "/bin", 1);
    setenv("LD_LIBRARY_PATH", "/lib", 1);
    execv(command[0], command);
    printf("cannot run %s: %s\n", command[0], strerror(errno));
    fflush(stdout);
    _exit(127);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  printf("@@BOCHS-END %d@@\n", code);
  fflush(stdout);
  fsync(1);
  usleep(200000); /* lets the serial port drain */
  power_off();
}
