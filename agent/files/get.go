package files

import (
	"archive/tar"
	"fmt"
	"io"
	"os"
	"path"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"banger/agent/stream"
	"banger/agent/sys"
)

// chunkWriter turns bytes into TAR_DATA frames.
type chunkWriter struct {
	s      *stream.Stream
	buffer []byte
}

func newChunkWriter(s *stream.Stream) *chunkWriter {
	return &chunkWriter{s, make([]byte, stream.HeaderBytes, stream.HeaderBytes+stream.MaxPayload)}
}

func (w *chunkWriter) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		room := cap(w.buffer) - len(w.buffer)
		if room == 0 {
			if err := w.flush(); err != nil {
				return 0, err
			}
			continue
		}
		if room > len(p) {
			room = len(p)
		}
		w.buffer = append(w.buffer, p[:room]...)
		p = p[room:]
	}
	return total, nil
}

func (w *chunkWriter) flush() error {
	if len(w.buffer) == stream.HeaderBytes {
		return nil
	}
	err := w.s.SendPrepared(stream.TarData, w.buffer)
	w.buffer = w.buffer[:stream.HeaderBytes]
	return err
}

// Get serves a get request.
func Get(s *stream.Stream, raw []byte) error {
	var request struct {
		Path string `json:"path"`
		Full bool   `json:"full"`
	}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	target, err := decodePath(request.Path)
	if err != nil {
		return err
	}
	var cancelled int32
	return s.Work(func() error {
		sink := newChunkWriter(s)
		result, err := Archive(sink, target, request.Full, func() bool { return atomic.LoadInt32(&cancelled) != 0 })
		if err != nil {
			return err
		}
		if err := sink.flush(); err != nil {
			return err
		}
		if err := s.Send(stream.TarEOF, nil); err != nil {
			return err
		}
		return s.Finish(result)
	}, nil, func() { atomic.StoreInt32(&cancelled, 1) })
}

type archiver struct {
	tar       *tar.Writer
	result    Result
	links     map[[2]uint64]string
	full      bool
	cancelled func() bool
	copy      []byte
}

// Archive writes the tree at target as a tar stream. A full one has extended attributes and device nodes too.
func Archive(sink io.Writer, target string, full bool, cancelled func() bool) (*Result, error) {
	name := path.Base(target)
	if name == "/" || name == "." || name == ".." {
		name = "."
	}
	follow := strings.HasSuffix(target, "/")
	parent, err := sys.Openat(sys.AtFdcwd, path.Dir(path.Clean(target)), syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path.Dir(target), Err: err}
	}
	defer syscall.Close(parent)
	last := path.Base(path.Clean(target))
	if last == "/" {
		last = "."
	}
	a := &archiver{tar: tar.NewWriter(sink), links: map[[2]uint64]string{}, full: full, cancelled: cancelled, copy: make([]byte, 128<<10)}
	a.result.Warnings = []string{}
	if err := a.add(parent, last, name, follow, true); err != nil {
		return nil, err
	}
	if err := a.tar.Close(); err != nil {
		return nil, err
	}
	return &a.result, nil
}

func (a *archiver) add(dirfd int, last, name string, follow, top bool) error {
	if a.cancelled() {
		return stream.Failed("cancelled", "cancelled")
	}
	gone := func(err error) error {
		if top {
			return &os.PathError{Op: "read", Path: name, Err: err}
		}
		a.result.warn("%s: %v", printable(name), err) // removed or hidden while we read
		return nil
	}
	flags := sys.AtSymlinkNofollow
	if follow {
		flags = 0
	}
	var st syscall.Stat_t
	if err := sys.Fstatat(dirfd, last, &st, flags); err != nil {
		return gone(err)
	}
	header := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, 0), Format: tar.FormatGNU,
	}
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		open := syscall.O_RDONLY | syscall.O_DIRECTORY
		if !follow {
			open |= syscall.O_NOFOLLOW
		}
		fd, err := sys.Openat(dirfd, last, open, 0)
		if err != nil {
			return gone(err)
		}
		file := os.NewFile(uintptr(fd), name)
		defer file.Close()
		header.Typeflag = tar.TypeDir
		header.Name += "/"
		a.attributes(dirfd, last, header)
		if err := a.tar.WriteHeader(header); err != nil {
			return err
		}
		a.result.Files++
		names, err := file.Readdirnames(-1)
		if err != nil {
			return gone(err)
		}
		sort.Strings(names)
		for _, child := range names {
			if err := a.add(fd, child, name+"/"+child, false, false); err != nil {
				return err
			}
		}
		return nil
	case syscall.S_IFLNK:
		target, err := sys.Readlinkat(dirfd, last)
		if err != nil {
			return gone(err)
		}
		header.Typeflag, header.Linkname = tar.TypeSymlink, target
		a.attributes(dirfd, last, header)
	case syscall.S_IFREG:
		if st.Nlink > 1 {
			key := [2]uint64{uint64(st.Dev), st.Ino}
			if first, ok := a.links[key]; ok {
				header.Typeflag, header.Linkname = tar.TypeLink, first
				break
			}
			a.links[key] = name
		}
		return a.file(dirfd, last, header, gone)
	case syscall.S_IFIFO:
		header.Typeflag = tar.TypeFifo
		a.attributes(dirfd, last, header)
	case syscall.S_IFCHR, syscall.S_IFBLK:
		if !a.full {
			a.result.warn("%s: a device, skipped", printable(name))
			return nil
		}
		header.Typeflag = tar.TypeChar
		if st.Mode&syscall.S_IFMT == syscall.S_IFBLK {
			header.Typeflag = tar.TypeBlock
		}
		device := uint64(st.Rdev) // gnu_dev_major and gnu_dev_minor of glibc
		header.Devmajor = int64(device>>8&0xfff | device>>32&^0xfff)
		header.Devminor = int64(device&0xff | device>>12&^0xff)
		a.attributes(dirfd, last, header)
	default:
		if a.full {
			return nil // a socket is its server's, who makes it anew
		}
		a.result.warn("%s: a socket, skipped", printable(name))
		return nil
	}
	a.result.Files++
	return a.tar.WriteHeader(header)
}

// attributes adds a name's extended attributes to its header as star and GNU tar do: SCHILY.xattr.<name> in pax.
func (a *archiver) attributes(dirfd int, last string, header *tar.Header) {
	if !a.full {
		return
	}
	found, err := sys.Xattrs(fmt.Sprintf("/proc/self/fd/%d/%s", dirfd, last))
	if err != nil {
		a.result.warn("%s: its extended attributes do not read: %v", printable(header.Name), err)
		return
	}
	for name, value := range found {
		if strings.Contains(name, "=") {
			a.result.warn("%s: an extended attribute has a name with =, left out", printable(header.Name))
			continue
		}
		if header.PAXRecords == nil {
			header.Format, header.PAXRecords = tar.FormatPAX, map[string]string{}
		}
		header.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func (a *archiver) file(dirfd int, last string, header *tar.Header, gone func(error) error) error {
	// O_NONBLOCK: the name may have become a FIFO since the stat.
	fd, err := sys.Openat(dirfd, last, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return gone(err)
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return gone(err)
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return gone(syscall.EINVAL)
	}
	header.Typeflag, header.Size = tar.TypeReg, st.Size
	a.attributes(dirfd, last, header)
	if err := a.tar.WriteHeader(header); err != nil {
		return err
	}
	left := st.Size
	for left > 0 {
		if a.cancelled() {
			return stream.Failed("cancelled", "cancelled")
		}
		want := int64(len(a.copy))
		if want > left {
			want = left
		}
		n, err := syscall.Read(fd, a.copy[:want])
		if err == syscall.EINTR {
			continue
		}
		if n <= 0 {
			// The header has promised the bytes: zeros, and a warning.
			a.result.warn("%s: shrank or failed while it was read (%v)", printable(header.Name), err)
			for i := range a.copy {
				a.copy[i] = 0
			}
			for left > 0 {
				n := int64(len(a.copy))
				if n > left {
					n = left
				}
				if _, err := a.tar.Write(a.copy[:n]); err != nil {
					return err
				}
				left -= n
			}
			break
		}
		if _, err := a.tar.Write(a.copy[:n]); err != nil {
			return err
		}
		left -= int64(n)
		a.result.Bytes += int64(n)
	}
	a.result.Files++
	return nil
}

// Stat serves a stat request.
func Stat(s *stream.Stream, raw []byte) error {
	var request struct {
		Path string `json:"path"`
	}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	target, err := decodePath(request.Path)
	if err != nil {
		return err
	}
	var st syscall.Stat_t
	err = sys.Fstatat(sys.AtFdcwd, target, &st, sys.AtSymlinkNofollow)
	if err == syscall.ENOENT || err == syscall.ENOTDIR {
		return s.Finish(map[string]interface{}{"exists": false})
	}
	if err != nil {
		return &os.PathError{Op: "stat", Path: fmt.Sprintf("%q", target), Err: err}
	}
	var behind interface{}
	if st.Mode&syscall.S_IFMT == syscall.S_IFLNK {
		var followed syscall.Stat_t
		if sys.Fstatat(sys.AtFdcwd, target, &followed, 0) == nil {
			behind = typeName(followed.Mode)
		}
	}
	return s.Finish(map[string]interface{}{
		"exists": true, "type": typeName(st.Mode), "mode": st.Mode & 0o7777, "size": st.Size,
		"uid": st.Uid, "gid": st.Gid, "mtime": float64(st.Mtim.Sec) + float64(st.Mtim.Nsec)/1e9, "target_type": behind,
	})
}

func typeName(mode uint32) string {
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return "file"
	case syscall.S_IFDIR:
		return "dir"
	case syscall.S_IFLNK:
		return "symlink"
	}
	return "other"
}
