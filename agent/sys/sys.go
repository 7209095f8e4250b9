// Package sys holds the system calls that package syscall of Go 1.19 lacks.
package sys

import (
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// Flags of openat2(2) and the *at calls, from linux/openat2.h and linux/fcntl.h.
const (
	ResolveNoMagiclinks = 0x02
	ResolveNoSymlinks   = 0x04
	ResolveBeneath      = 0x08
	ResolveInRoot       = 0x10

	AtFdcwd           = -0x64
	AtSymlinkNofollow = 0x100
	AtSymlinkFollow   = 0x400
	AtRemovedir       = 0x200

	OPath    = 0x200000
	OTmpfile = 0x400000 | syscall.O_DIRECTORY

	sysOpenat2 = 437
)

type openHow struct{ flags, mode, resolve uint64 }

// Openat2 opens path below dirfd. A race with a rename is tried again a bounded number of times.
func Openat2(dirfd int, path string, flags int, mode uint32, resolve uint64) (int, error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	how := openHow{uint64(flags | syscall.O_CLOEXEC), uint64(mode), resolve}
	for try := 0; ; try++ {
		fd, _, errno := syscall.Syscall6(sysOpenat2, uintptr(dirfd), uintptr(unsafe.Pointer(p)),
			uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
		if (errno == syscall.EINTR || errno == syscall.EAGAIN) && try < 100 {
			continue
		}
		if errno != 0 {
			return -1, errno
		}
		return int(fd), nil
	}
}

// Openat opens path relative to dirfd, close-on-exec.
func Openat(dirfd int, path string, flags int, mode uint32) (int, error) {
	for {
		fd, err := syscall.Openat(dirfd, path, flags|syscall.O_CLOEXEC, mode)
		if err != syscall.EINTR {
			return fd, err
		}
	}
}

// Fstatat is newfstatat(2).
func Fstatat(dirfd int, path string, st *syscall.Stat_t, flags int) error {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall6(sysFstatat, uintptr(dirfd), uintptr(unsafe.Pointer(p)),
		uintptr(unsafe.Pointer(st)), uintptr(flags), 0, 0)
	return orNil(errno)
}

// Unlinkat removes a name; flags is 0 or AtRemovedir.
func Unlinkat(dirfd int, path string, flags int) error {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(syscall.SYS_UNLINKAT, uintptr(dirfd), uintptr(unsafe.Pointer(p)), uintptr(flags))
	return orNil(errno)
}

// Symlinkat makes a symlink.
func Symlinkat(target string, dirfd int, path string) error {
	t, err := syscall.BytePtrFromString(target)
	if err != nil {
		return err
	}
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(syscall.SYS_SYMLINKAT, uintptr(unsafe.Pointer(t)), uintptr(dirfd), uintptr(unsafe.Pointer(p)))
	return orNil(errno)
}

// NameFile gives a name to a file that was opened without one (open(2), O_TMPFILE).
func NameFile(fd, dirfd int, path string) error {
	return linkat(AtFdcwd, "/proc/self/fd/"+strconv.Itoa(fd), dirfd, path, AtSymlinkFollow)
}

// Linkat makes a hard link; a symlink as source is linked itself.
func Linkat(oldfd int, oldpath string, newfd int, newpath string) error {
	return linkat(oldfd, oldpath, newfd, newpath, 0)
}

func linkat(oldfd int, oldpath string, newfd int, newpath string, flags uintptr) error {
	o, err := syscall.BytePtrFromString(oldpath)
	if err != nil {
		return err
	}
	n, err := syscall.BytePtrFromString(newpath)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall6(syscall.SYS_LINKAT, uintptr(oldfd), uintptr(unsafe.Pointer(o)),
		uintptr(newfd), uintptr(unsafe.Pointer(n)), flags, 0)
	return orNil(errno)
}

// Readlinkat reads a symlink.
func Readlinkat(dirfd int, path string) (string, error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return "", err
	}
	buf := make([]byte, 4096)
	n, _, errno := syscall.Syscall6(syscall.SYS_READLINKAT, uintptr(dirfd), uintptr(unsafe.Pointer(p)),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
	if errno != 0 {
		return "", errno
	}
	return string(buf[:n]), nil
}

// Utimensat sets both times of a name (not followed); with path "" those of the open file dirfd.
func Utimensat(dirfd int, path string, unixSec, nsec int64) error {
	ts := [2]syscall.Timespec{
		{Sec: unixSec, Nsec: nsec},
		{Sec: unixSec, Nsec: nsec},
	}
	var p *byte
	flags := 0
	if path != "" {
		var err error
		if p, err = syscall.BytePtrFromString(path); err != nil {
			return err
		}
		flags = AtSymlinkNofollow
	}
	_, _, errno := syscall.Syscall6(syscall.SYS_UTIMENSAT, uintptr(dirfd), uintptr(unsafe.Pointer(p)),
		uintptr(unsafe.Pointer(&ts)), uintptr(flags), 0, 0)
	return orNil(errno)
}

// Xattrs returns the extended attributes of a name, a symlink's own; none where the file system has none.
func Xattrs(path string) (map[string]string, error) {
	names, err := growing(4096, func(buf []byte) (uintptr, syscall.Errno) {
		return xattrCall(syscall.SYS_LLISTXATTR, path, nil, buf)
	})
	if err == syscall.ENOTSUP || err == syscall.ENODATA || err == nil && len(names) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, name := range strings.Split(strings.TrimRight(string(names), "\x00"), "\x00") {
		attribute, err := syscall.BytePtrFromString(name)
		if err != nil {
			return nil, err
		}
		value, err := growing(1024, func(buf []byte) (uintptr, syscall.Errno) {
			return xattrCall(syscall.SYS_LGETXATTR, path, attribute, buf)
		})
		if err == syscall.ENODATA {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		found[name] = string(value)
	}
	return found, nil
}

func xattrCall(number uintptr, path string, attribute *byte, buf []byte) (uintptr, syscall.Errno) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return 0, syscall.EINVAL
	}
	if attribute == nil {
		n, _, errno := syscall.Syscall(number, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		return n, errno
	}
	n, _, errno := syscall.Syscall6(number, uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(attribute)),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0)
	return n, errno
}

// growing calls with larger buffers until what is read fits.
func growing(size int, call func([]byte) (uintptr, syscall.Errno)) ([]byte, error) {
	const largest = 64 << 10 // XATTR_SIZE_MAX and XATTR_LIST_MAX
	for {
		buf := make([]byte, size)
		n, errno := call(buf)
		if errno == syscall.ERANGE && size < largest {
			size = largest
			continue
		}
		if errno != 0 {
			return nil, errno
		}
		return buf[:n], nil
	}
}

// FinitModule loads a kernel module from an open file.
func FinitModule(fd int, parameters string) error {
	p, err := syscall.BytePtrFromString(parameters)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(sysFinitModule, uintptr(fd), uintptr(unsafe.Pointer(p)), 0)
	return orNil(errno)
}

// Ioctl with a pointer or number argument.
func Ioctl(fd int, request, argument uintptr) error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, argument)
	return orNil(errno)
}

// IoctlUint64 is an ioctl whose argument points to a u64.
func IoctlUint64(fd int, request uintptr, value *uint64) error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(value)))
	return orNil(errno)
}

type pollFd struct {
	fd      int32
	events  int16
	revents int16
}

// HungUp tells without waiting whether the other end of fd is gone.
func HungUp(fd int) bool {
	const pollRdhup, pollErr, pollHup, pollNval = 0x2000, 0x8, 0x10, 0x20
	p := pollFd{fd: int32(fd), events: pollRdhup}
	var zero syscall.Timespec
	n, _, errno := syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1,
		uintptr(unsafe.Pointer(&zero)), 0, 0, 0)
	return errno == 0 && n == 1 && p.revents&(pollRdhup|pollErr|pollHup|pollNval) != 0
}

func orNil(errno syscall.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
