package exec

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"banger/agent/stream"
	"banger/agent/sys"
)

const (
	tiocSPtLck  = 0x40045431
	tiocGPtPeer = 0x5441
	tiocGPtN    = 0x80045430
	tiocSWinsz  = 0x5414
	fionread    = 0x541b
)

// openPty returns the master and the slave of a new pty.
func openPty(tty *TTY, account *Account) (master, slave int, err error) {
	master, err = syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	fail := func(what string, err error) (int, int, error) {
		syscall.Close(master)
		return -1, -1, fmt.Errorf("%s: %w", what, err)
	}
	unlock := int32(0)
	if err = sys.Ioctl(master, tiocSPtLck, uintptr(unsafe.Pointer(&unlock))); err != nil {
		return fail("unlock the pty", err)
	}
	// TIOCGPTPEER needs no path: whatever the image did to /dev/pts, this is our slave.
	peer, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(master), tiocGPtPeer,
		uintptr(syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC))
	if errno != 0 {
		return fail("open the pty's slave", errno)
	}
	slave = int(peer)
	_ = setWindow(master, tty.Rows, tty.Cols)
	if os.Getuid() == 0 {
		_ = syscall.Fchown(slave, int(account.UID), 5) // gid 5 is `tty` wherever there is one
		_ = syscall.Fchmod(slave, 0o620)
	}
	return master, slave, nil
}

func setWindow(master int, rows, cols uint16) error {
	size := [4]uint16{rows, cols, 0, 0}
	return sys.Ioctl(master, tiocSWinsz, uintptr(unsafe.Pointer(&size)))
}

var (
	spawnMutex sync.Mutex
	// OOMAdjust is true in the guest's agent: it has a low OOM score that its children must not inherit.
	OOMAdjust bool
)

// SetOOMScore sets this process's score.
func SetOOMScore(score string) {
	if file, err := os.OpenFile("/proc/self/oom_score_adj", os.O_WRONLY, 0); err == nil {
		_, _ = file.WriteString(score)
		file.Close()
	}
}

// AgentOOMScore is the long-lived agent's score.
const AgentOOMScore = "-900"

// notStarted is a program that cannot be run: a line for stderr and the code a shell would give.
type notStarted struct {
	code    int
	message string
}

func (e *notStarted) Error() string { return e.message }

// spawn starts the program as execvp would find it, in a session of its own.
func spawn(request *Request, place *place, files [3]uintptr) (*os.Process, error) {
	account := place.account
	attributes := &os.ProcAttr{
		Dir: place.cwd,
		Env: place.env,
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: request.TTY != nil, Ctty: 0},
	}
	for i, fd := range files {
		file := borrowed(fd, i)
		if file == nil {
			return nil, stream.Failed("io", "out of file descriptors")
		}
		defer file.Close()
		attributes.Files = append(attributes.Files, file)
	}
	if os.Getuid() == 0 {
		attributes.Sys.Credential = &syscall.Credential{Uid: account.UID, Gid: account.GID, Groups: account.Groups}
	}
	name := request.Argv[0]
	failure := &notStarted{127, name + ": not found"}
	for _, path := range candidates(name, place.env) {
		process, err := startOnce(path, request.Argv, attributes, request.Within)
		if err == nil {
			return process, nil
		}
		switch {
		case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG):
		case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
			failure = &notStarted{126, name + ": permission denied"}
		case errors.Is(err, syscall.ENOEXEC):
			return nil, &notStarted{126, name + ": exec format error"}
		case errors.Is(err, syscall.E2BIG):
			return nil, &notStarted{126, name + ": argument list too long"}
		case errors.Is(err, syscall.ETXTBSY), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.EISDIR):
			return nil, &notStarted{126, fmt.Sprintf("%s: %v", name, errors.Unwrap(err))}
		default:
			return nil, stream.Failed("io", "start %q: %v", name, err)
		}
	}
	return nil, failure
}

// Run runs a program of ours as root to its end, in a session of its own, its output going to a file.
func Run(argv, environment []string, output *os.File, limit time.Duration) error {
	null, err := os.OpenFile("/dev/null", os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	process, err := startOnce(argv[0], argv, &os.ProcAttr{
		Dir: "/", Env: environment, Files: []*os.File{null, output, output}, Sys: &syscall.SysProcAttr{Setsid: true},
	}, nil)
	if err != nil {
		return err
	}
	timer := time.AfterFunc(limit, func() { KillSession(process.Pid) })
	defer timer.Stop()
	state, err := process.Wait()
	if err == nil && !state.Success() {
		err = fmt.Errorf("it ended with %s", state)
	}
	return err
}

// WithoutSpawn runs something while no process is being started, so that none is half in a cgroup.
func WithoutSpawn(run func()) {
	spawnMutex.Lock()
	defer spawnMutex.Unlock()
	run()
}

func startOnce(path string, argv []string, attributes *os.ProcAttr, within func() (leave func())) (*os.Process, error) {
	spawnMutex.Lock()
	defer spawnMutex.Unlock()
	if within != nil {
		defer within()()
	}
	if OOMAdjust {
		// The child copies the score at fork; set after it, a grandchild could keep ours.
		SetOOMScore("0")
		defer SetOOMScore(AgentOOMScore)
	}
	return os.StartProcess(path, argv, attributes)
}

// candidates lists what to try for a program name.
func candidates(name string, env []string) []string {
	if name == "" {
		return nil
	}
	if strings.Contains(name, "/") {
		return []string{name}
	}
	path := ""
	for _, entry := range env {
		if strings.HasPrefix(entry, "PATH=") {
			path = entry[len("PATH="):]
		}
	}
	var list []string
	for _, directory := range strings.Split(path, ":") {
		if directory == "" {
			directory = "."
		}
		candidate := directory + "/" + name
		if directory[0] == '/' {
			if info, err := os.Stat(candidate); err != nil || info.IsDir() {
				continue // a fork each for what is surely not there would be slow
			}
		}
		list = append(list, candidate)
	}
	return list
}
