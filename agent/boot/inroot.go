package boot

import (
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

// directory opens a directory (O_PATH), made with its parents where missing.
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
		if err := syscall.Mkdirat(parent, path.Base(name), 0o755); err != nil {
			return -1, &os.PathError{Op: "mkdir", Path: name, Err: err}
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
	if err := sys.Unlinkat(parent, name, 0); err != nil && err != syscall.ENOENT {
		return &os.PathError{Op: "unlink", Path: file.Path, Err: err}
	}
	fd, err := sys.Openat(parent, name, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: file.Path, Err: err}
	}
	out := os.NewFile(uintptr(fd), file.Path)
	defer out.Close()
	if _, err := out.Write(content); err != nil {
		return err
	}
	if err := out.Chown(file.UID, file.GID); err != nil {
		return err
	}
	return syscall.Fchmod(fd, file.Mode&0o7777)
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
	fd, err := sys.Openat2(r.fd, inside(name), sys.OPath, 0, sys.ResolveInRoot|sys.ResolveNoMagiclinks)
	if err != nil {
		return false
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	return syscall.Fstat(fd, &st) == nil && st.Mode&syscall.S_IFMT == syscall.S_IFREG && st.Mode&0o111 != 0
}
