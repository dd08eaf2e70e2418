/* Makes system calls that change the disk fail below a directory, as a failing disk would.
 *
 * Preloaded by scripts/disk_failures.py. FAILING_BELOW is the directory, FAILING_IF a file: while it
 * exists, its first line is the errno that is answered; followed by "meta" it is for those writes only
 * with which LMDB ends a transaction. What programs and libraries call goes through
 * here, LMDB's writes as well; the kernel's own doings do not.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int below(const char *path)
{
    const char *place = getenv("FAILING_BELOW");
    size_t length = place ? strlen(place) : 0;

    return length && !strncmp(path, place, length) && (path[length] == '/' || !path[length]);
}

/* Returns the errno of now, or 0; for what ends a transaction, or for all else. */
static int failing_for(int meta)
{
    static int (*real)(const char *, int, ...);
    const char *file = getenv("FAILING_IF");
    char text[16] = "";
    int fd;

    if (!real)
        real = dlsym(RTLD_NEXT, "open");
    if (!file || (fd = real(file, O_RDONLY | O_CLOEXEC)) < 0)
        return 0;
    if (read(fd, text, sizeof text - 1) < 0)
        text[0] = 0;
    close(fd);
    return meta || !strstr(text, "meta") ? atoi(text) : 0;
}

static int fails_at_for(const char *path, int meta)
{
    int code, before = errno;

    if (!below(path) || !(code = failing_for(meta))) {
        errno = before;
        return 0;
    }
    errno = code;
    return 1;
}

static int fails_at(const char *path)
{
    return fails_at_for(path, 0);
}

static int fails_on_for(int fd, int meta)
{
    char link[32], path[PATH_MAX];
    ssize_t length;
    int before = errno;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails_at_for(path, meta);
}

static int fails_on(int fd)
{
    return fails_on_for(fd, 0);
}

/* LMDB's two first pages say which state is the last one. */
static int ends(size_t size, off64_t at)
{
    return at < 8192 && size < 4096;
}

static int fails_from(int fd, const char *path)
{
    if (path[0] == '/')
        return strncmp(path, "/proc/self/fd/", 14) ? fails_at(path) : fails_on(atoi(path + 14));
    if (fd == AT_FDCWD) {
        char here[PATH_MAX];
        return getcwd(here, sizeof here) && fails_at(here);
    }
    return fails_on(fd);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ON(type, name, parameters, arguments) \
    type name parameters { return fails_on(fd) ? -1 : REAL(name) arguments; }
#define AT(type, name, parameters, arguments) \
    type name parameters { return fails_from(AT_FDCWD, path) ? -1 : REAL(name) arguments; }
#define FROM(type, name, parameters, arguments) \
    type name parameters { return fails_from(at, path) ? -1 : REAL(name) arguments; }

ON(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))

ssize_t pwrite(int fd, const void *data, size_t size, off_t at)
{
    return fails_on_for(fd, ends(size, at)) ? -1 : REAL(pwrite)(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at)
{
    return fails_on_for(fd, ends(size, at)) ? -1 : REAL(pwrite64)(fd, data, size, at);
}

ON(ssize_t, writev, (int fd, const struct iovec *data, int count), (fd, data, count))
ON(ssize_t, pwritev, (int fd, const struct iovec *data, int count, off_t at), (fd, data, count, at))
ON(ssize_t, pwritev64, (int fd, const struct iovec *data, int count, off64_t at),
   (fd, data, count, at))
ON(int, fsync, (int fd), (fd))
ON(int, fdatasync, (int fd), (fd))
ON(int, ftruncate, (int fd, off_t size), (fd, size))
ON(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON(int, fsetxattr, (int fd, const char *name, const void *value, size_t size, int flags),
   (fd, name, value, size, flags))
AT(int, truncate, (const char *path, off_t size), (path, size))
AT(int, truncate64, (const char *path, off64_t size), (path, size))
AT(int, setxattr, (const char *path, const char *name, const void *value, size_t size, int flags),
   (path, name, value, size, flags))
AT(int, lsetxattr, (const char *path, const char *name, const void *value, size_t size, int flags),
   (path, name, value, size, flags))
AT(int, mkdir, (const char *path, mode_t mode), (path, mode))
AT(int, mknod, (const char *path, mode_t mode, dev_t device), (path, mode, device))
AT(int, mkfifo, (const char *path, mode_t mode), (path, mode))
FROM(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode))
FROM(int, mknodat, (int at, const char *path, mode_t mode, dev_t device), (at, path, mode, device))

int link(const char *old, const char *path)
{
    return fails_from(AT_FDCWD, path) ? -1 : REAL(link)(old, path);
}

int linkat(int from, const char *old, int at, const char *path, int flags)
{
    return fails_from(at, path) ? -1 : REAL(linkat)(from, old, at, path, flags);
}

int symlink(const char *target, const char *path)
{
    return fails_from(AT_FDCWD, path) ? -1 : REAL(symlink)(target, path);
}

int symlinkat(const char *target, int at, const char *path)
{
    return fails_from(at, path) ? -1 : REAL(symlinkat)(target, at, path);
}

int rename(const char *old, const char *path)
{
    return fails_from(AT_FDCWD, path) ? -1 : REAL(rename)(old, path);
}

int renameat(int from, const char *old, int at, const char *path)
{
    return fails_from(at, path) ? -1 : REAL(renameat)(from, old, at, path);
}

int renameat2(int from, const char *old, int at, const char *path, unsigned int flags)
{
    return fails_from(at, path) ? -1 : REAL(renameat2)(from, old, at, path, flags);
}

int posix_fallocate(int fd, off_t at, off_t size)
{
    return fails_on(fd) ? errno : REAL(posix_fallocate)(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size)
{
    return fails_on(fd) ? errno : REAL(posix_fallocate64)(fd, at, size);
}

/* A new file; one that is there can be opened, and read. */
static int makes(int flags)
{
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list more; \
        mode_t mode; \
        va_start(more, flags); \
        mode = makes(flags) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (makes(flags) && access(path, F_OK) && fails_from(AT_FDCWD, path)) \
            return -1; \
        return REAL(name)(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        va_list more; \
        mode_t mode; \
        va_start(more, flags); \
        mode = makes(flags) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (makes(flags) && faccessat(at, path, F_OK, 0) && fails_from(at, path)) \
            return -1; \
        return REAL(name)(at, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
