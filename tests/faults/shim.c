/* Makes the n-th call of a kind fail, or the process die at it; for LD_PRELOAD on Linux with glibc.
 *
 * fault_arm() says what happens in this process and those that it forks, fault_state() what has happened; for a program
 * that calls neither, the environment does (arm_from_environment). Calls on files count only inside one directory;
 * allocations and mappings count everywhere. A death is a kill (what was written stays), or a loss of power: of the
 * data that were not synced half are lost, and the process's changes of directories that were not synced are either all
 * there or all undone. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum kind { WRITE, FSYNC, RENAME, OPEN, MMAP, ALLOC, UNLINK, MKDIR, KINDS };
enum action { FAIL = 0, KILL = 1, POWER_KEEPS_NAMES = 2, POWER_UNDOES_NAMES = 3, POWER_AND_LYING_DISK = 4 };
#define ANY KINDS /* counts every call on files */
#define NOTES 512

struct state { /* shared with forked processes */
  atomic_long counts[KINDS + 1];
  atomic_int fired;
};
static struct state* state;
static char directory[PATH_MAX];
static char notes[200]; /* where overwritten and unlinked files stay until the change is synced */
static int kind = -1, error, sticky, action;
static long nth, least_bytes;
static _Thread_local int inside; /* a call of our own */

/* ---- What a loss of power takes ---- */

static struct dirty {
  int fd;
  dev_t device;
  ino_t inode;
  off_t synced; /* bytes at the last sync, or when this process first wrote */
} dirty[NOTES];
static int dirty_count;

enum change_kind { CREATED, RENAMED, UNLINKED, MADE };
static struct change {
  enum change_kind kind;
  char from[256], to[256], kept[256];
} changes[NOTES];
static int change_count;

static void full(void) {
  static const char text[] = "fault shim: too many notes\n";
  syscall(SYS_write, 2, text, sizeof text - 1);
  syscall(SYS_exit_group, 99);
}

static int find_dirty(int fd) {
  struct stat status;
  if (fstat(fd, &status)) return -1;
  for (int i = 0; i < dirty_count; i++)
    if (dirty[i].device == status.st_dev && dirty[i].inode == status.st_ino) return i;
  return -1;
}

static void note_write(int fd) {
  struct stat status;
  if (action < POWER_KEEPS_NAMES || find_dirty(fd) >= 0 || fstat(fd, &status) || !S_ISREG(status.st_mode)) return;
  if (dirty_count == NOTES) full();
  dirty[dirty_count++] = (struct dirty){fcntl(fd, F_DUPFD_CLOEXEC, 500), status.st_dev, status.st_ino, status.st_size};
}

static void parent_of(const char* path, char* out) {
  snprintf(out, 256, "%s", path);
  char* slash = strrchr(out, '/');
  if (slash) *slash = 0;
}

static void note_sync(int fd) {
  if (action < POWER_KEEPS_NAMES || action == POWER_AND_LYING_DISK) return;
  struct stat status, other;
  if (fstat(fd, &status)) return;
  const int i = find_dirty(fd);
  if (i >= 0) {
    syscall(SYS_close, dirty[i].fd);
    dirty[i] = dirty[--dirty_count];
  }
  if (!S_ISDIR(status.st_mode)) return;
  int left = 0;
  for (int c = 0; c < change_count; c++) {
    char parent[256];
    parent_of(changes[c].to, parent);
    if (!stat(parent, &other) && other.st_ino == status.st_ino) {
      if (changes[c].kept[0]) syscall(SYS_unlinkat, AT_FDCWD, changes[c].kept, 0);
    } else {
      changes[left++] = changes[c];
    }
  }
  change_count = left;
}

static void note_change(enum change_kind what, const char* from, const char* to) {
  if (action < POWER_KEEPS_NAMES) return;
  if (change_count == NOTES) full();
  static int number;
  struct change* change = &changes[change_count++];
  *change = (struct change){.kind = what};
  if (from) snprintf(change->from, sizeof change->from, "%s", from);
  snprintf(change->to, sizeof change->to, "%s", to);
  if (what != CREATED && what != MADE && !access(to, F_OK)) {
    snprintf(change->kept, sizeof change->kept, "%s/%d", notes, number++);
    if (linkat(AT_FDCWD, to, AT_FDCWD, change->kept, 0)) change->kept[0] = 0;
  }
}

static void lose_power(void) {
  for (int i = 0; i < dirty_count; i++) {
    struct stat status;
    if (fstat(dirty[i].fd, &status) || status.st_size <= dirty[i].synced) continue;
    (void)!syscall(SYS_ftruncate, dirty[i].fd, dirty[i].synced + (status.st_size - dirty[i].synced) / 2);
  }
  if (action != POWER_UNDOES_NAMES) return;
  for (int c = change_count - 1; c >= 0; c--) {
    struct change* change = &changes[c];
    if (change->kind == CREATED) syscall(SYS_unlinkat, AT_FDCWD, change->to, 0);
    if (change->kind == MADE) syscall(SYS_unlinkat, AT_FDCWD, change->to, AT_REMOVEDIR);
    if (change->kind == RENAMED) syscall(SYS_renameat2, AT_FDCWD, change->to, AT_FDCWD, change->from, 0);
    if (change->kept[0]) linkat(AT_FDCWD, change->kept, AT_FDCWD, change->to, 0);
  }
}

/* ---- What happens when ---- */

static void die(void) {
  if (action >= POWER_KEEPS_NAMES) lose_power();
  syscall(SYS_kill, getpid(), SIGKILL);
}

/* Counts a call; nonzero if it shall fail with errno. */
static int strike(enum kind what) {
  if (!state || inside) return 0;
  const long number = atomic_fetch_add(&state->counts[what], 1) + 1;
  long any = 0;
  if (what != MMAP && what != ALLOC) any = atomic_fetch_add(&state->counts[ANY], 1) + 1;
  if ((int)what != kind && !(kind == ANY && any)) return 0;
  const long at = kind == ANY ? any : number;
  if (at != nth && !(sticky && at > nth)) return 0;
  atomic_store(&state->fired, 1);
  if (action != FAIL) {
    inside = 1;
    die();
  }
  errno = error;
  return 1;
}

static int in_directory(const char* path) {
  const size_t length = strlen(directory);
  return state && length && path && !strncmp(path, directory, length);
}

static int fd_in_directory(int fd) {
  if (!state || !directory[0] || fd < 3) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return in_directory(path);
}

/* What to arm: kind -1 counts only. `at_least`: smaller allocations do not count. Begins counting from zero. */
void fault_arm(int what, long number, int with, int stays, int how, long at_least, const char* where) {
  if (!state) state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  memset((void*)state, 0, sizeof *state);
  kind = what, nth = number, error = with, sticky = stays, action = how, least_bytes = at_least;
  snprintf(directory, sizeof directory, "%s", where);
  snprintf(notes, sizeof notes, "%s.notes", where);
}

/* EDGE_RAZOR_FAULT="kind n errno sticky action least_bytes directory", as for fault_arm(), and EDGE_RAZOR_FAULT_STATE a
 * file of sizeof(struct state), which counts on over all processes that are given it. */
__attribute__((constructor)) static void arm_from_environment(void) {
  const char *fault = getenv("EDGE_RAZOR_FAULT"), *file = getenv("EDGE_RAZOR_FAULT_STATE");
  int where = 0;
  if (!fault || !file ||
      sscanf(fault, "%d %ld %d %d %d %ld %n", &kind, &nth, &error, &sticky, &action, &least_bytes, &where) != 6)
    return;
  snprintf(directory, sizeof directory, "%s", fault + where);
  snprintf(notes, sizeof notes, "%s.notes", fault + where);
  const int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CLOEXEC);
  void* shared = (void*)syscall(SYS_mmap, NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  syscall(SYS_close, fd);
  if (shared != MAP_FAILED) state = shared;
}

/* The counts of all kinds, of all calls on files, and whether the fault has happened. */
void fault_state(long* out) {
  for (int k = 0; k <= KINDS; k++) out[k] = state ? atomic_load(&state->counts[k]) : 0;
  out[KINDS + 1] = state ? atomic_load(&state->fired) : 0;
}

/* ---- The calls ---- */

#define REAL(name)               \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void* data, size_t bytes) {
  REAL(write);
  if (!inside && fd_in_directory(fd)) {
    if (action != FAIL && kind >= 0) { /* dies in the middle of it */
      inside = 1;
      note_write(fd);
      inside = 0;
      const long next = state->counts[kind == ANY ? ANY : WRITE] + 1;
      if ((kind == ANY || kind == WRITE) && next == nth) (void)!real(fd, data, bytes / 2);
    }
    if (strike(WRITE)) return -1;
  }
  return real(fd, data, bytes);
}

int fsync(int fd) {
  REAL(fsync);
  if (inside || !fd_in_directory(fd)) return real(fd);
  if (strike(FSYNC)) return -1;
  inside = 1;
  note_sync(fd);
  inside = 0;
  return real(fd);
}

int ftruncate(int fd, off_t length) {
  REAL(ftruncate);
  if (!inside && fd_in_directory(fd) && strike(WRITE)) return -1;
  return real(fd, length);
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int rename(const char* from, const char* to) {
  REAL(rename);
  if (inside || !in_directory(to)) return real(from, to);
  if (strike(RENAME)) return -1;
  inside = 1;
  note_change(RENAMED, from, to);
  inside = 0;
  return real(from, to);
}

int unlink(const char* path) {
  REAL(unlink);
  if (inside || !in_directory(path)) return real(path);
  if (strike(UNLINK)) return -1;
  inside = 1;
  if (!access(path, F_OK)) note_change(UNLINKED, NULL, path);
  inside = 0;
  return real(path);
}

int mkdir(const char* path, mode_t mode) {
  REAL(mkdir);
  if (inside || !in_directory(path)) return real(path, mode);
  if (strike(MKDIR)) return -1;
  const int status = real(path, mode);
  if (!status) note_change(MADE, NULL, path);
  return status;
}

static int opening(const char* path, int flags) {
  if (inside || !in_directory(path)) return 0;
  if (strike(OPEN)) return -1;
  inside = 1;
  if (flags & O_CREAT && access(path, F_OK)) note_change(CREATED, NULL, path);
  inside = 0;
  return 0;
}

int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
  va_end(list);
  if (opening(path, flags)) return -1;
  return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
  va_end(list);
  return open(path, flags | O_LARGEFILE, mode);
}

void* mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (strike(MMAP)) return MAP_FAILED;
  return (void*)syscall(SYS_mmap, at, bytes, protection, flags, fd, offset);
}
void* mmap64(void* at, size_t bytes, int protection, int flags, int fd, off64_t offset) {
  return mmap(at, bytes, protection, flags, fd, offset);
}

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static int refused(size_t bytes) { return state && (long)bytes >= least_bytes && strike(ALLOC); }

void* malloc(size_t bytes) { return refused(bytes) ? NULL : __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) { return refused(count * bytes) ? NULL : __libc_calloc(count, bytes); }
void* realloc(void* old, size_t bytes) { return refused(bytes) ? NULL : __libc_realloc(old, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) {
  return refused(bytes) ? NULL : __libc_memalign(alignment, bytes);
}
void* memalign(size_t alignment, size_t bytes) { return refused(bytes) ? NULL : __libc_memalign(alignment, bytes); }
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  if (refused(bytes)) return ENOMEM;
  *out = __libc_memalign(alignment, bytes);
  return *out ? 0 : ENOMEM;
}
