package boot

import (
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"

	"banger/agent/sys"
)

// scratch takes what an export changes, in memory: the disks stay as they are.
const scratch = "/scratch"

// export makes the image's root readable at newRoot and stays in the initramfs: no program of the image runs, no file
// system is mounted over the image's, and nothing is written to its disks but what a journal has to say.
func export(config *Config) (step string, err error) {
	step = "join the disks"
	if err := mountExport(); err != nil {
		return step, err
	}
	inRoot, err := openRoot(newRoot)
	if err != nil {
		return step, err
	}
	step = "remove the identity"
	if err := neutralize(inRoot, config); err != nil {
		return step, err
	}
	syscall.Close(inRoot.fd)
	_ = os.RemoveAll("/banger")
	step = "start the agent"
	duties := &Duties{}
	pid, err := startAgent(true, duties)
	if err != nil {
		return step, err
	}
	mark("agent")
	Log("export: ms since boot:%s", marks)
	return "be init", beInit(pid, duties)
}

func mountExport() error {
	for _, name := range []string{newRoot, scratch} {
		if err := os.MkdirAll(name, 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mount("tmpfs", scratch, "tmpfs", noSuidDevExec, "mode=0700"); err != nil {
		return &os.PathError{Op: "mount", Path: scratch, Err: err}
	}
	for _, name := range []string{scratch + "/upper", scratch + "/work"} {
		if err := os.Mkdir(name, 0o755); err != nil {
			return err
		}
	}
	lower := "/base"
	// A machine that never started has nothing of its own.
	if info, err := os.Lstat("/own/upper"); err == nil && info.IsDir() {
		lower = "/own/upper:/base"
	}
	options := "lowerdir=" + lower + ",upperdir=" + scratch + "/upper,workdir=" + scratch + "/work"
	if err := syscall.Mount("overlay", newRoot, "overlay", syscall.MS_NOATIME, options); err != nil {
		return &os.PathError{Op: "mount", Path: newRoot, Err: err}
	}
	return nil
}

// neutralize removes what makes the machine this one. Unlike at a boot, what fails fails: a copy that kept a key is
// worse than none.
func neutralize(r *root, config *Config) error {
	for _, pattern := range config.Export.Remove {
		if err := r.removeFiles(pattern); err != nil {
			return err
		}
	}
	for _, name := range config.Export.Empty {
		if err := r.empty(name); err != nil {
			return err
		}
	}
	for i := range config.Export.DropLines {
		if err := r.dropLines(&config.Export.DropLines[i]); err != nil {
			return err
		}
	}
	for i := range config.Files {
		if err := r.writeFile(&config.Files[i]); err != nil {
			return err
		}
	}
	return nil
}

// existing opens a directory inside; -1 where there is none.
func (r *root) existing(name string) int {
	const flags = syscall.O_RDONLY | syscall.O_DIRECTORY
	fd, err := sys.Openat2(r.fd, inside(name), flags, 0, sys.ResolveInRoot|sys.ResolveNoMagiclinks)
	if err != nil {
		return -1
	}
	return fd
}

// removeFiles removes the plain files that match a pattern.
func (r *root) removeFiles(pattern string) error {
	fd := r.existing(path.Dir(pattern))
	if fd < 0 {
		return nil
	}
	directory := os.NewFile(uintptr(fd), path.Dir(pattern))
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if matches, _ := path.Match(path.Base(pattern), name); !matches {
			continue
		}
		var st syscall.Stat_t
		if err := sys.Fstatat(fd, name, &st, sys.AtSymlinkNofollow); err != nil {
			return &os.PathError{Op: "stat", Path: name, Err: err}
		}
		if st.Mode&syscall.S_IFMT != syscall.S_IFREG {
			continue
		}
		if err := sys.Unlinkat(fd, name, 0); err != nil {
			return &os.PathError{Op: "unlink", Path: pattern, Err: err}
		}
	}
	return nil
}

// empty removes what is in a directory, following no link.
func (r *root) empty(name string) error {
	fd := r.existing(name)
	if fd < 0 {
		return nil
	}
	directory := os.NewFile(uintptr(fd), name)
	defer directory.Close()
	names, err := directory.Readdirnames(-1)
	for _, child := range names {
		if err == nil {
			err = os.RemoveAll(fmt.Sprintf("/proc/self/fd/%d/%s", fd, child))
		}
	}
	return err
}

// dropLines writes a file anew without some lines; one that has none of them is left alone.
func (r *root) dropLines(lines *Lines) error {
	fd := r.existing(path.Dir(lines.Path))
	if fd < 0 {
		return nil
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	err := sys.Fstatat(fd, path.Base(lines.Path), &st, sys.AtSymlinkNofollow)
	if err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return nil // a boot writes a plain file there: what is none of those is not ours
	}
	found := readSmall(fd, path.Base(lines.Path))
	left := withoutLines(found, lines.Content)
	if len(left) == len(found) {
		return nil
	}
	return r.writeFile(&File{
		Path: lines.Path, Mode: st.Mode & 0o7777, UID: int(st.Uid), GID: int(st.Gid), Content: left,
	})
}

// withoutLines returns found without the lines of unwanted.
func withoutLines(found, unwanted []byte) []byte {
	drop := map[string]bool{}
	for _, line := range strings.Split(strings.TrimRight(string(unwanted), "\n"), "\n") {
		drop[line] = true
	}
	var kept strings.Builder
	for _, line := range strings.SplitAfter(string(found), "\n") {
		if bare := strings.TrimSuffix(line, "\n"); line != "" && !(drop[bare] && bare != "") {
			kept.WriteString(line)
		}
	}
	return []byte(kept.String())
}
