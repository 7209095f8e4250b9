// Package files moves trees in and out as tar streams, and tells what a path is.
//
// Nothing is ever resolved through a symlink below the target: directories are opened relative to
// descriptors with openat2(RESOLVE_BENEATH|RESOLVE_NO_SYMLINKS).
package files

import (
	"archive/tar"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"

	"banger/agent/stream"
	"banger/agent/sys"
)

const (
	maxWarnings  = 100
	cachedFds    = 128
	maxDirTimes  = 1 << 20
	stagedPrefix = ".banger-staged-" // what a replaced file is called until it is whole
	resolveBelow = sys.ResolveBeneath | sys.ResolveNoSymlinks | sys.ResolveNoMagiclinks
	openDir      = syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_NOFOLLOW
)

// Owner overrides the owners of a tar.
type Owner struct {
	UID int `json:"uid"`
	GID int `json:"gid"`
}

// Result is the END of put and get.
type Result struct {
	Files    int64    `json:"files"`
	Bytes    int64    `json:"bytes"`
	Warnings []string `json:"warnings"`
}

func (r *Result) warn(format string, arguments ...interface{}) {
	if len(r.Warnings) < maxWarnings {
		r.Warnings = append(r.Warnings, fmt.Sprintf(format, arguments...))
	}
}

func decodePath(text string) (string, error) {
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return "", stream.Failed("bad_request", "bad base64 in path: %v", err)
	}
	if len(raw) == 0 || len(raw) > 4096 || strings.IndexByte(string(raw), 0) >= 0 {
		return "", stream.Failed("bad_request", "bad path %q", raw)
	}
	if raw[0] != '/' {
		return "", stream.Failed("bad_request", "path %q is not absolute", raw)
	}
	return string(raw), nil
}

// tarReader turns TAR_DATA frames into bytes.
type tarReader struct {
	s    *stream.Stream
	rest []byte
	eof  bool
}

// overError marks an error that ended the stream itself.
type overError struct{ err error }

func (e *overError) Error() string { return e.err.Error() }
func (e *overError) Unwrap() error { return e.err }

func (r *tarReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.eof {
			return 0, io.EOF
		}
		frame, err := r.s.Next()
		if err != nil {
			return 0, &overError{err}
		}
		switch frame.Type {
		case stream.TarData:
			r.rest = frame.Payload
		case stream.TarEOF:
			r.eof = true
		default:
			return 0, &overError{fmt.Errorf("%w: frame type 0x%02x in a tar stream", stream.ErrProtocol, frame.Type)}
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Put serves a put request.
func Put(s *stream.Stream, raw []byte) error {
	var request struct {
		Path  string `json:"path"`
		Mode  string `json:"mode"`
		Owner *Owner `json:"owner"`
	}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	target, err := decodePath(request.Path)
	if err != nil {
		return err
	}
	if request.Mode != "create" && request.Mode != "merge" {
		return stream.Failed("bad_request", "mode %q", request.Mode)
	}
	source := &tarReader{s: s}
	result, err := Extract(source, target, request.Mode == "create", request.Owner)
	var over *overError
	if errors.As(err, &over) {
		return over.err
	}
	if err != nil {
		return err
	}
	for !source.eof { // padding behind the end-of-archive blocks
		source.rest = nil
		if _, err := source.Read(make([]byte, 1)); err != nil && err != io.EOF {
			if errors.As(err, &over) {
				return over.err
			}
			return err
		}
	}
	return s.Finish(result)
}

type dirTime struct {
	name string
	sec  int64
	nsec int64
}

type extractor struct {
	root   int
	fds    map[string]int
	order  []string
	owner  *Owner
	result Result
	times  []dirTime
	copy   []byte
	isRoot bool
	merge  bool
}

// Extract writes a tar stream below target.
func Extract(source io.Reader, target string, create bool, owner *Owner) (*Result, error) {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return nil, err
	}
	root, err := sys.Openat(sys.AtFdcwd, target, syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: target, Err: err}
	}
	x := &extractor{root: root, fds: map[string]int{}, owner: owner, copy: make([]byte, 256<<10),
		isRoot: os.Getuid() == 0, merge: !create}
	x.result.Warnings = []string{}
	defer x.close()
	if create {
		names, err := readNames(root, 1)
		if err != nil {
			return nil, err
		}
		if len(names) > 0 && !(len(names) == 1 && names[0] == "lost+found") {
			return nil, stream.Failed("exists", "%s exists and is not empty", target)
		}
	}
	reader := tar.NewReader(source)
	for {
		header, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			var over *overError
			if errors.As(err, &over) {
				return nil, err
			}
			return nil, stream.Failed("io", "the tar stream is damaged: %v", err)
		}
		if err := x.entry(header, reader); err != nil {
			var over *overError
			if errors.As(err, &over) {
				return nil, err
			}
			failure := stream.AsFailure(err)
			return nil, stream.Failed(failure.Code, "%s: %s", printable(header.Name), failure.Message)
		}
	}
	// Last, children first: writing into a directory changes its time.
	for i := len(x.times) - 1; i >= 0; i-- {
		d := x.times[i]
		if fd, err := sys.Openat2(x.root, d.name, openDir, 0, resolveBelow); err == nil {
			_ = sys.Utimensat(fd, "", d.sec, d.nsec)
			syscall.Close(fd)
		}
	}
	return &x.result, nil
}

func printable(name string) string {
	if len(name) > 300 {
		name = name[:300] + "..."
	}
	return fmt.Sprintf("%q", name)
}

func readNames(dirfd, limit int) ([]string, error) {
	fd, err := sys.Openat(dirfd, ".", openDir, 0)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), ".")
	defer file.Close()
	names, err := file.Readdirnames(limit + 1)
	if err == io.EOF {
		err = nil
	}
	return names, err
}

func (x *extractor) close() {
	for _, fd := range x.fds {
		syscall.Close(fd)
	}
	syscall.Close(x.root)
}

// cleanName returns a relative name without `.` and empty parts; `..` is an error.
func cleanName(name string) (string, error) {
	simple := true
	start := 0
	for i := 0; i <= len(name); i++ {
		if i == len(name) || name[i] == '/' {
			switch part := name[start:i]; part {
			case "..":
				return "", stream.Failed("bad_request", "the name holds `..`")
			case "", ".":
				simple = false
			}
			start = i + 1
		}
	}
	if simple {
		return name, nil
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// parent returns a descriptor of the directory of name, made where it is missing, and the last part.
func (x *extractor) parent(name string) (int, string, error) {
	i := strings.LastIndexByte(name, '/')
	if i < 0 {
		return x.root, name, nil
	}
	fd, err := x.directory(name[:i])
	return fd, name[i+1:], err
}

func (x *extractor) directory(name string) (int, error) {
	if fd, ok := x.fds[name]; ok {
		return fd, nil
	}
	fd, err := sys.Openat2(x.root, name, openDir, 0, resolveBelow)
	if err == syscall.ENOENT {
		above, last, parentErr := x.parent(name)
		if parentErr != nil {
			return -1, parentErr
		}
		if err := syscall.Mkdirat(above, last, 0o755); err != nil && err != syscall.EEXIST {
			return -1, err
		}
		if err := x.setOwner(above, last, 0, 0); err != nil {
			return -1, err
		}
		fd, err = sys.Openat2(x.root, name, openDir, 0, resolveBelow)
	}
	if err != nil {
		return -1, err
	}
	x.fds[name] = fd
	x.order = append(x.order, name)
	return fd, nil
}

func (x *extractor) forget(name string) {
	for cached, fd := range x.fds {
		if cached == name || strings.HasPrefix(cached, name+"/") {
			syscall.Close(fd)
			delete(x.fds, cached)
			for i, ordered := range x.order {
				if ordered == cached {
					x.order = append(x.order[:i:i], x.order[i+1:]...)
					break
				}
			}
		}
	}
}

func (x *extractor) ids(uid, gid int) (int, int, bool) {
	if x.owner != nil {
		uid, gid = x.owner.UID, x.owner.GID
	}
	return uid, gid, x.isRoot && (uid != 0 || gid != 0)
}

func (x *extractor) setOwner(dirfd int, name string, uid, gid int) error {
	if uid, gid, needed := x.ids(uid, gid); needed {
		return syscall.Fchownat(dirfd, name, uid, gid, sys.AtSymlinkNofollow)
	}
	return nil
}

func (x *extractor) entry(h *tar.Header, data io.Reader) error {
	// Only here: within an entry no descriptor in use may be closed.
	for len(x.order) > cachedFds {
		oldest := x.order[0]
		x.order = x.order[1:]
		syscall.Close(x.fds[oldest])
		delete(x.fds, oldest)
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	// The umask (022) takes bits off a mode at creation; set-id bits go with a chown.
	mode := uint32(h.Mode) & 0o7777
	if name == "" {
		if h.Typeflag == tar.TypeDir { // the target itself
			if err := syscall.Fchmod(x.root, mode); err != nil {
				return err
			}
			if uid, gid, needed := x.ids(h.Uid, h.Gid); needed {
				if err := syscall.Fchown(x.root, uid, gid); err != nil {
					return err
				}
			}
			x.times = append(x.times, dirTime{".", h.ModTime.Unix(), int64(h.ModTime.Nanosecond())})
			return nil
		}
		return stream.Failed("bad_request", "an entry without a name")
	}
	dirfd, last, err := x.parent(name)
	if err != nil {
		return err
	}
	sec, nsec := h.ModTime.Unix(), int64(h.ModTime.Nanosecond())
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeRegA, tar.TypeGNUSparse:
		if err := x.file(dirfd, last, name, h, data, mode); err != nil {
			return err
		}
		x.result.Files++
		return nil
	case tar.TypeDir:
		err := syscall.Mkdirat(dirfd, last, mode)
		if err == syscall.EEXIST {
			var st syscall.Stat_t
			if err := sys.Fstatat(dirfd, last, &st, sys.AtSymlinkNofollow); err != nil {
				return err
			}
			if st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
				return syscall.ENOTDIR
			}
		} else if err != nil {
			return err
		}
		fd, err := x.directory(name)
		if err != nil {
			return err
		}
		if err := x.setOwner(dirfd, last, h.Uid, h.Gid); err != nil {
			return err
		}
		if err := syscall.Fchmod(fd, mode); err != nil {
			return err
		}
		if len(x.times) < maxDirTimes {
			x.times = append(x.times, dirTime{name, sec, nsec})
		}
	case tar.TypeSymlink:
		if err := x.replace(dirfd, last, name, func(at string) error { return sys.Symlinkat(h.Linkname, dirfd, at) }); err != nil {
			return err
		}
		if err := x.setOwner(dirfd, last, h.Uid, h.Gid); err != nil {
			return err
		}
		_ = sys.Utimensat(dirfd, last, sec, nsec)
	case tar.TypeLink:
		linked, err := cleanName(h.Linkname)
		if err != nil {
			return err
		}
		if linked == name {
			return stream.Failed("bad_request", "a hard link to itself")
		}
		fromfd, from, err := x.parent(linked)
		if err != nil {
			return err
		}
		if err := x.replace(dirfd, last, name, func(at string) error { return sys.Linkat(fromfd, from, dirfd, at) }); err != nil {
			return fmt.Errorf("hard link to %s: %w", printable(h.Linkname), err)
		}
	case tar.TypeFifo:
		if err := x.replace(dirfd, last, name, func(at string) error {
			return syscall.Mknodat(dirfd, at, syscall.S_IFIFO|mode, 0)
		}); err != nil {
			return err
		}
		if err := x.setOwner(dirfd, last, h.Uid, h.Gid); err != nil {
			return err
		}
	case tar.TypeXGlobalHeader:
		return nil
	default:
		x.result.warn("%s: entry type %q skipped", printable(h.Name), string(h.Typeflag))
		return nil
	}
	x.result.Files++
	return nil
}

// place runs make for the name, or, when that is taken, for one beside it: who looks meanwhile finds the
// old or the new, never nothing and never half of it. It returns the other name, for `settle`. An empty
// directory gives way at once, as with tar.
func (x *extractor) place(dirfd int, last, name string, make func(at string) error) (string, error) {
	err := make(last)
	if err != syscall.EEXIST {
		return "", err
	}
	switch err := sys.Unlinkat(dirfd, last, sys.AtRemovedir); err {
	case nil:
		x.forget(name)
		return "", make(last)
	case syscall.ENOTDIR:
		random := [8]byte{}
		_, _ = rand.Read(random[:]) // it never fails
		staged := stagedPrefix + hex.EncodeToString(random[:])
		return staged, make(staged)
	default:
		return "", err
	}
}

// settle gives what `place` made its name, unless making it whole has failed.
func settle(dirfd int, staged, last string, err error) error {
	if staged == "" {
		return err
	}
	if err == nil {
		err = syscall.Renameat(dirfd, staged, dirfd, last)
	}
	// Of two names of one file a rename leaves both.
	_ = sys.Unlinkat(dirfd, staged, 0)
	return err
}

// replace makes what is whole at once.
func (x *extractor) replace(dirfd int, last, name string, make func(at string) error) error {
	staged, err := x.place(dirfd, last, name, make)
	return settle(dirfd, staged, last, err)
}

func (x *extractor) file(dirfd int, last, name string, h *tar.Header, data io.Reader, mode uint32) error {
	fd, unnamed := -1, false
	staged, err := x.place(dirfd, last, name, func(at string) (err error) {
		if at != last {
			// Nothing of it is left by a machine that ends meanwhile, where the file system can do that.
			if fd, err = sys.Openat(dirfd, ".", syscall.O_WRONLY|sys.OTmpfile, mode); err == nil {
				unnamed = true
				return nil
			}
		}
		fd, err = sys.Openat(dirfd, at, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW, mode)
		return err
	})
	if err == nil {
		if err = x.fill(fd, h, data, mode); err == nil {
			_ = sys.Utimensat(fd, "", h.ModTime.Unix(), int64(h.ModTime.Nanosecond()))
			if unnamed {
				err = sys.NameFile(fd, dirfd, staged)
			}
		}
		if closeErr := syscall.Close(fd); err == nil {
			err = closeErr
		}
	}
	return settle(dirfd, staged, last, err)
}

func (x *extractor) fill(fd int, h *tar.Header, data io.Reader, mode uint32) error {
	for {
		n, err := data.Read(x.copy)
		for start := 0; start < n; {
			written, writeErr := syscall.Write(fd, x.copy[start:n])
			if writeErr == syscall.EINTR {
				continue
			}
			if writeErr != nil {
				return writeErr
			}
			start += written
		}
		x.result.Bytes += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	uid, gid, needed := x.ids(h.Uid, h.Gid)
	if needed {
		if err := syscall.Fchown(fd, uid, gid); err != nil {
			return err
		}
	}
	if mode&0o7022 != 0 {
		return syscall.Fchmod(fd, mode)
	}
	return nil
}
