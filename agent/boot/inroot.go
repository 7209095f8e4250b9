package boot

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"

	"banger/agent/sys"
)

// root is a directory that no path leaves: an image's symlinks are resolved inside it.
type root struct{ fd int }

func openRoot(name string) (*root, error) {
	fd, err := sys.Openat(sys.AtFdcwd, name, sys.OPath|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return &root{fd}, nil
}

func inside(name string) string {
	name = strings.TrimLeft(name, "/")
	if name == "" {
		return "."
	}
	return name
}

// directory opens a directory (O_PATH), made with its parents where missing. A symlink that leads nowhere gives way
// to a directory.
func (r *root) directory(name string) (int, error) {
	const flags = sys.OPath | syscall.O_DIRECTORY
	const resolve = sys.ResolveInRoot | sys.ResolveNoMagiclinks
	fd, err := sys.Openat2(r.fd, inside(name), flags, 0, resolve)
	if err == syscall.ENOENT && inside(name) != "." {
		parent, parentErr := r.directory(path.Dir(name))
		if parentErr != nil {
			return -1, parentErr
		}
		defer syscall.Close(parent)
		made := syscall.Mkdirat(parent, path.Base(name), 0o755)
		if made == syscall.EEXIST {
			if _, notLink := sys.Readlinkat(parent, path.Base(name)); notLink == nil {
				_ = sys.Unlinkat(parent, path.Base(name), 0)
				made = syscall.Mkdirat(parent, path.Base(name), 0o755)
			}
		}
		if made != nil {
			return -1, &os.PathError{Op: "mkdir", Path: name, Err: made}
		}
		fd, err = sys.Openat2(r.fd, inside(name), flags, 0, resolve)
	}
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// mount mounts onto a directory inside, through its descriptor.
func (r *root) mount(source, target, fstype string, flags uintptr, data string) error {
	fd, err := r.directory(target)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	if err := syscall.Mount(source, fmt.Sprintf("/proc/self/fd/%d", fd), fstype, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

// writeFile writes beside and renames: a full disk costs no line that was there.
func (r *root) writeFile(file *File) error {
	parent, err := r.directory(path.Dir(file.Path))
	if err != nil {
		return err
	}
	defer syscall.Close(parent)
	name := path.Base(file.Path)
	content := file.Content
	if file.KeepLines {
		content = withLines(readSmall(parent, name), content)
	}
	const staged = ".banger-staged"
	if err := sys.Unlinkat(parent, staged, 0); err != nil && err != syscall.ENOENT {
		return &os.PathError{Op: "unlink", Path: file.Path, Err: err}
	}
	fd, err := sys.Openat(parent, staged, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: file.Path, Err: err}
	}
	out := os.NewFile(uintptr(fd), file.Path)
	defer out.Close()
	_, err = out.Write(content)
	if err == nil {
		err = out.Chown(file.UID, file.GID)
	}
	if err == nil {
		err = syscall.Fchmod(fd, file.Mode&0o7777)
	}
	if err == nil {
		if err = syscall.Renameat(parent, staged, parent, name); err != nil {
			err = &os.PathError{Op: "rename", Path: file.Path, Err: err}
		}
	}
	if err != nil {
		_ = sys.Unlinkat(parent, staged, 0)
	}
	return err
}

// exists tells whether a path inside is there; a symlink that leads nowhere is not.
func (r *root) exists(name string) bool {
	fd, err := sys.Openat2(r.fd, inside(name), sys.OPath, 0, sys.ResolveInRoot|sys.ResolveNoMagiclinks)
	if err == nil {
		syscall.Close(fd)
	}
	return err == nil
}

// symlinkIfAbsent makes a symlink where there is nothing of that name.
func (r *root) symlinkIfAbsent(target, name string) error {
	parent, err := r.directory(path.Dir(name))
	if err != nil {
		return err
	}
	defer syscall.Close(parent)
	if err := sys.Symlinkat(target, parent, path.Base(name)); err != nil && err != syscall.EEXIST {
		return &os.PathError{Op: "symlink", Path: name, Err: err}
	}
	return nil
}

// readSmall returns a regular file's content; nothing for any other, or one of more than 1 MiB.
func readSmall(parent int, name string) []byte {
	const limit = 1 << 20
	fd, err := sys.Openat(parent, name, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	in := os.NewFile(uintptr(fd), name)
	defer in.Close()
	info, err := in.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > limit {
		return nil
	}
	content, err := io.ReadAll(io.LimitReader(in, limit))
	if err != nil {
		return nil
	}
	return content
}

// withLines returns found with the lines of wanted that it lacks behind it.
func withLines(found, wanted []byte) []byte {
	if len(found) > 0 && found[len(found)-1] != '\n' {
		found = append(found, '\n')
	}
	have := map[string]bool{}
	for _, line := range strings.Split(string(found), "\n") {
		have[line] = true
	}
	for _, line := range strings.Split(strings.TrimRight(string(wanted), "\n"), "\n") {
		if !have[line] {
			found = append(found, line+"\n"...)
		}
	}
	return found
}

func (r *root) makeDirectory(d *Directory) error {
	path, err := r.directory(d.Path)
	if err != nil {
		return err
	}
	defer syscall.Close(path)
	// O_PATH descriptors take no fchmod.
	fd, err := sys.Openat(path, ".", syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: d.Path, Err: err}
	}
	defer syscall.Close(fd)
	if err := syscall.Fchown(fd, d.UID, d.GID); err != nil {
		return &os.PathError{Op: "chown", Path: d.Path, Err: err}
	}
	if err := syscall.Fchmod(fd, d.Mode&0o7777); err != nil {
		return &os.PathError{Op: "chmod", Path: d.Path, Err: err}
	}
	return nil
}

// isExecutable tells whether a path inside is a file that can be executed.
func (r *root) isExecutable(name string) bool {
	fd := r.openExecutable(name)
	if fd >= 0 {
		syscall.Close(fd)
	}
	return fd >= 0
}

// openExecutable opens (O_PATH) a regular file that has an execute bit; -1 where there is none.
func (r *root) openExecutable(name string) int {
	fd, err := sys.Openat2(r.fd, inside(name), sys.OPath, 0, sys.ResolveInRoot|sys.ResolveNoMagiclinks)
	if err != nil {
		return -1
	}
	var st syscall.Stat_t
	if syscall.Fstat(fd, &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFREG && st.Mode&0o111 != 0 {
		return fd
	}
	syscall.Close(fd)
	return -1
}

// isInit tells whether a path inside is a program of this machine that can be PID 1.
func (r *root) isInit(name string) bool {
	fd := r.openExecutable(name)
	if fd < 0 {
		return false
	}
	defer syscall.Close(fd)
	real, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil || notInits[path.Base(real)] {
		return false
	}
	return r.canRun(name, 0)
}

// canRun tells whether the kernel would execute a file inside: a binary of this machine whose loader is there, or a
// script whose interpreter is.
func (r *root) canRun(name string, depth int) bool {
	const deepest = 4 // BINPRM_MAX_RECURSION
	fd, err := sys.Openat2(r.fd, inside(name), syscall.O_RDONLY|syscall.O_NONBLOCK, 0, sys.ResolveInRoot|sys.ResolveNoMagiclinks)
	if err != nil || depth > deepest {
		return false
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	if !r.isExecutable(name) {
		return false
	}
	head := make([]byte, 256)
	n, err := io.ReadFull(file, head)
	if err != nil && err != io.ErrUnexpectedEOF {
		return false
	}
	head = head[:n]
	if bytes.HasPrefix(head, []byte("#!")) {
		line := strings.SplitN(string(head[2:]), "\n", 2)[0]
		words := strings.Fields(line)
		return len(words) > 0 && r.canRun(words[0], depth+1)
	}
	loader, ok := elfLoader(file)
	return ok && (loader == "" || r.isExecutable(loader))
}
