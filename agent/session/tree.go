package session

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"banger/agent/exec"
)

// Numbers of fsopen(2), fsconfig(2) and fsmount(2), the same on every architecture, and of linux/mount.h.
const (
	sysFsopen       = 430
	sysFsconfig     = 431
	sysFsmount      = 432
	fsopenCloexec   = 1
	fsmountCloexec  = 1
	fsconfigCreate  = 6
	cgroupOfAll     = "banger"
	leftoverPatient = 2 * time.Second
)

// NoCgroups is set where the agent is on a host that is not its own.
var NoCgroups bool

var (
	hierarchyOnce sync.Once
	hierarchyPath string
)

// hierarchy returns a path to the cgroup2 hierarchy, "" where there is none. It is a mount of our own that stands in no
// directory: what the image mounts where, and whether at all, does not matter.
func hierarchy() string {
	hierarchyOnce.Do(func() {
		if NoCgroups {
			return
		}
		name, _ := syscall.BytePtrFromString("cgroup2")
		fd, _, errno := syscall.Syscall(sysFsopen, uintptr(unsafe.Pointer(name)), fsopenCloexec, 0)
		if errno != 0 {
			return
		}
		defer syscall.Close(int(fd))
		if _, _, errno = syscall.Syscall6(sysFsconfig, fd, fsconfigCreate, 0, 0, 0, 0); errno != 0 {
			return
		}
		mount, _, errno := syscall.Syscall(sysFsmount, fd, fsmountCloexec, 0)
		if errno != 0 {
			return
		}
		path := "/proc/self/fd/" + strconv.Itoa(int(mount))
		if err := os.Mkdir(path+"/"+cgroupOfAll, 0o755); err == nil || os.IsExist(err) {
			hierarchyPath = path
		}
	})
	return hierarchyPath
}

// tree is all processes of a session: a cgroup, or where there are none a session (setsid).
type tree struct {
	group   string // path of the cgroup; "" for none
	outside int32  // atomic: not 0 when a process could not begin in it
	sid     int64  // atomic
}

func newTree(id string) *tree {
	if root := hierarchy(); root != "" {
		group := root + "/" + cgroupOfAll + "/" + id
		if err := os.Mkdir(group, 0o755); err == nil || os.IsExist(err) {
			return &tree{group: group}
		}
	}
	return &tree{}
}

// within moves the agent into the cgroup and returns what moves it back: a child begins where its parent is. Only
// in this way has it no instant outside (Go 1.19 has no CLONE_INTO_CGROUP).
func (t *tree) within() (leave func()) {
	if t.group == "" {
		return func() {}
	}
	own := ""
	raw, _ := os.ReadFile("/proc/self/cgroup")
	for _, line := range strings.Split(string(raw), "\n") {
		if strings.HasPrefix(line, "0::") {
			own = line[len("0::"):]
		}
	}
	if !move(t.group) {
		atomic.StoreInt32(&t.outside, 1)
		return func() {}
	}
	return func() {
		if !move(hierarchy() + own) {
			move(hierarchy())
		}
	}
}

func move(group string) bool { return write(group+"/cgroup.procs", "0") }

func write(path, text string) bool {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return false
	}
	defer file.Close()
	_, err = file.WriteString(text)
	return err == nil
}

func (t *tree) pids() []int {
	var pids []int
	if t.group != "" {
		pids = groupPids(t.group)
	}
	if sid := atomic.LoadInt64(&t.sid); sid != 0 && (t.group == "" || atomic.LoadInt32(&t.outside) != 0) {
		pids = append(pids, exec.SessionPids(int(sid))...)
	}
	return pids
}

func groupPids(group string) (pids []int) {
	raw, _ := os.ReadFile(group + "/cgroup.procs")
	for _, line := range strings.Fields(string(raw)) {
		if pid, err := strconv.Atoi(line); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	for _, child := range children(group) { // one that runs containers makes cgroups of its own
		pids = append(pids, groupPids(child)...)
	}
	return pids
}

func children(group string) (paths []string) {
	entries, _ := os.ReadDir(group)
	for _, entry := range entries {
		if entry.IsDir() {
			paths = append(paths, group+"/"+entry.Name())
		}
	}
	return paths
}

func (t *tree) signal(number syscall.Signal) {
	exec.WithoutSpawn(func() { // the agent itself is not among them
		for _, pid := range t.pids() {
			_ = syscall.Kill(pid, number)
		}
	})
}

// end sends SIGTERM, waits for at most so long, and kills what is left; it tells whether none is. With a terminal
// SIGHUP goes along: a shell that talks with somebody ignores SIGTERM.
func (t *tree) end(patience time.Duration, terminal bool) bool {
	if patience > 0 && len(t.pids()) > 0 {
		t.signal(syscall.SIGTERM)
		if terminal {
			t.signal(syscall.SIGHUP)
		}
		t.signal(syscall.SIGCONT) // one that is stopped would not see it
		for deadline := time.Now().Add(patience); len(t.pids()) > 0 && time.Now().Before(deadline); {
			time.Sleep(20 * time.Millisecond)
		}
	}
	for try := 0; try < 250; try++ {
		if len(t.pids()) == 0 {
			return true
		}
		killed := false
		if t.group != "" && atomic.LoadInt32(&t.outside) == 0 {
			exec.WithoutSpawn(func() { killed = write(t.group+"/cgroup.kill", "1") }) // Linux 5.14
		}
		if !killed {
			t.signal(syscall.SIGKILL)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return false
}

func (t *tree) remove() {
	if t.group != "" {
		removeGroup(t.group)
	}
}

func removeGroup(group string) {
	for _, child := range children(group) {
		removeGroup(child)
	}
	_ = os.Remove(group)
}
