// Package exec runs processes for the host: pipes or a pty, credit for stdin, exact ends.
package exec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"banger/agent/stream"
	"banger/agent/sys"
)

const (
	drainIdle     = 250 * time.Millisecond
	drainTotal    = 2 * time.Second
	hangUpGrace   = 5 * time.Second
	timeoutGrace  = 2 * time.Second
	detachedLimit = 8 << 20
)

// LogDirectory takes the output of detached processes.
var LogDirectory = "/var/log/banger"

// Etc is where passwd, group and environment are.
var Etc = "/etc"

// ExitBody is EXIT's.
type ExitBody struct {
	Code     *int `json:"code"`
	Signal   *int `json:"signal"`
	Core     bool `json:"core"`
	TimedOut bool `json:"timed_out"`
}

// ExitOf says how a process ended.
func ExitOf(state *os.ProcessState) (body ExitBody) {
	status, _ := state.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		number := int(status.Signal())
		body.Signal, body.Core = &number, status.CoreDump()
	} else {
		code := status.ExitStatus()
		body.Code = &code
	}
	return body
}

func borrowed(fd uintptr, i int) *os.File {
	// A dup, so that the os.File may be collected whenever it likes.
	duplicate, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 3)
	if errno != 0 {
		return nil
	}
	return os.NewFile(duplicate, "stdio"+strconv.Itoa(i))
}

// pipe returns a pipe of which our end is polled and the child's end blocks.
func pipe(name string, oursIsRead bool) (ours *os.File, child int, err error) {
	var fds [2]int
	if err := syscall.Pipe2(fds[:], syscall.O_CLOEXEC); err != nil {
		return nil, -1, err
	}
	our, theirs := fds[0], fds[1]
	if !oursIsRead {
		our, theirs = theirs, our
	}
	if err := syscall.SetNonblock(our, true); err != nil {
		return nil, -1, err
	}
	return os.NewFile(uintptr(our), name), theirs, nil
}

type job struct {
	*Child
	request *Request
	s       *stream.Stream
	stdin   *stdinQueue

	exitMutex sync.Mutex
	exited    chan struct{}
	cancelled chan struct{}
	timedOut  int32
}

type output struct {
	file *os.File
	kind byte
}

// Handle serves an exec request.
func Handle(s *stream.Stream, raw []byte) error {
	request, err := ParseRequest(raw)
	if err != nil {
		return err
	}
	place, err := locate(request)
	if err != nil {
		return err
	}
	j := &job{request: request, s: s, exited: make(chan struct{}), cancelled: make(chan struct{})}
	if request.Detach {
		return j.detach(place)
	}
	if j.Child, err = start(request, place); err != nil {
		var failure *notStarted
		if !errors.As(err, &failure) {
			return err
		}
		if err := s.Send(stream.Stderr, []byte("banger: "+clip(failure.message, 1024)+"\n")); err != nil {
			return err
		}
		if err := s.SendJSON(stream.Exit, ExitBody{Code: &failure.code}); err != nil {
			return err
		}
		return s.Finish(nil)
	}
	return s.Work(j.run, j.frame, j.cancel)
}

func clip(text string, limit int) string {
	if len(text) > limit {
		return text[:limit] + "..."
	}
	return text
}

// place is who runs a process, with which environment, and where.
type place struct {
	account *Account
	env     []string
	cwd     string
}

func locate(request *Request) (*place, error) {
	account, err := LookUp(request.User, Etc)
	if err != nil {
		return nil, err
	}
	cwd := request.Cwd
	if cwd == "" {
		cwd = account.Home
		if info, err := os.Stat(cwd); err != nil || !info.IsDir() {
			cwd = "/"
		}
	} else if info, err := os.Stat(cwd); err != nil {
		return nil, stream.Failed("bad_cwd", "working directory %q: %v", cwd, errors.Unwrap(err))
	} else if !info.IsDir() {
		return nil, stream.Failed("bad_cwd", "working directory %q is not a directory", cwd)
	}
	return &place{account, environment(request, account, Etc), cwd}, nil
}

// Child is a process with our ends of its files.
type Child struct {
	Process *os.Process
	Input   *os.File // a pipe, or Master; nil for none
	Stdout  *os.File // a pipe, or Master
	Stderr  *os.File // nil with a pty
	Master  *os.File // of the pty; nil for none
	Cwd     string
}

// Start starts a process, as Handle does but for nobody's stream.
func Start(request *Request) (*Child, error) {
	place, err := locate(request)
	if err != nil {
		return nil, err
	}
	child, err := start(request, place)
	var failure *notStarted
	if errors.As(err, &failure) {
		return nil, stream.Failed("not_found", "%s", clip(failure.message, 1024))
	}
	return child, err
}

func start(request *Request, place *place) (c *Child, err error) {
	c = &Child{Cwd: place.cwd}
	theirs := [3]int{-1, -1, -1}
	defer func() {
		closed := map[int]bool{-1: true}
		for _, fd := range theirs {
			if !closed[fd] {
				syscall.Close(fd)
				closed[fd] = true
			}
		}
		if err != nil {
			c.Close()
		}
	}()
	if request.TTY != nil {
		master, slave, err := openPty(request.TTY, place.account)
		if err != nil {
			return c, err
		}
		theirs = [3]int{slave, slave, slave}
		if err := syscall.SetNonblock(master, true); err != nil {
			return c, err
		}
		c.Master = os.NewFile(uintptr(master), "pty")
		c.Input, c.Stdout = c.Master, c.Master
	} else {
		if request.Stdin {
			c.Input, theirs[0], err = pipe("stdin", false)
		} else {
			theirs[0], err = syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		}
		if err != nil {
			return c, err
		}
		if c.Stdout, theirs[1], err = pipe("stdout", true); err != nil {
			return c, err
		}
		if c.Stderr, theirs[2], err = pipe("stderr", true); err != nil {
			return c, err
		}
	}
	c.Process, err = spawn(request, place, [3]uintptr{uintptr(theirs[0]), uintptr(theirs[1]), uintptr(theirs[2])})
	return c, err
}

// Close closes our ends.
func (c *Child) Close() {
	for _, file := range []*os.File{c.Input, c.Stdout, c.Stderr} {
		if file != nil {
			file.Close() // twice, for a pty: the second fails
		}
	}
}

// Resize sets the size of the pty.
func (c *Child) Resize(payload []byte) {
	var size struct{ Rows, Cols uint16 }
	if c.Master == nil || stream.Decode(payload, &size) != nil {
		return
	}
	if raw, err := c.Master.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = setWindow(int(fd), size.Rows, size.Cols) })
	}
}

// SignalNumber reads the payload of a SIGNAL; 0 is none.
func SignalNumber(payload []byte) syscall.Signal {
	var signal struct{ Number int }
	if stream.Decode(payload, &signal) != nil || signal.Number < 1 || signal.Number > 64 {
		return 0
	}
	return syscall.Signal(signal.Number)
}

// run is the worker: it ends when the process and its output have ended, or the host is gone.
func (j *job) run() error {
	if j.Input != nil {
		j.stdinQueue().start(j)
	}
	startErr := j.s.SendJSON(stream.Started, map[string]int{"pid": j.Process.Pid})
	timer := j.startTimeout()
	outputs := []output{{j.Stdout, stream.Stdout}}
	if j.Stderr != nil {
		outputs = append(outputs, output{j.Stderr, stream.Stderr})
	}
	var pumps sync.WaitGroup
	drains := make([]*Drain, len(outputs))
	for i, out := range outputs {
		drains[i] = &Drain{}
		pumps.Add(1)
		go func(out output, d *Drain) {
			defer pumps.Done()
			j.pump(out, d)
		}(out, drains[i])
	}
	finished := make(chan struct{})
	var state *os.ProcessState
	var waitErr error
	// Not this goroutine: a process that lives on after a hang-up must not keep the port busy.
	go func() {
		defer close(finished)
		state, waitErr = j.Process.Wait()
		j.exitMutex.Lock()
		close(j.exited)
		j.exitMutex.Unlock()
		timer()
		for i, out := range outputs {
			drains[i].Begin(out.file)
		}
		pumps.Wait()
		j.Close()
		if j.stdin != nil {
			j.stdin.stop()
		}
	}()
	if startErr != nil {
		return startErr
	}
	select {
	case <-finished:
	case <-j.cancelled:
		return nil
	}
	if waitErr != nil {
		return waitErr
	}
	body := ExitOf(state)
	body.TimedOut = atomic.LoadInt32(&j.timedOut) != 0
	if err := j.s.SendJSON(stream.Exit, body); err != nil {
		return err
	}
	return j.s.Finish(nil)
}

func (j *job) hasExited() bool {
	select {
	case <-j.exited:
		return true
	default:
		return false
	}
}

// startTimeout arms timeout_s and returns what disarms it.
func (j *job) startTimeout() func() {
	if j.request.TimeoutS <= 0 {
		return func() {}
	}
	timer := time.AfterFunc(time.Duration(j.request.TimeoutS*float64(time.Second)), func() {
		if j.hasExited() {
			return
		}
		atomic.StoreInt32(&j.timedOut, 1)
		j.signalGroup(syscall.SIGTERM)
		select {
		case <-j.exited:
		case <-time.After(timeoutGrace):
		}
		KillSession(j.Process.Pid)
	})
	return func() { timer.Stop() }
}

// Drain says how long to read on after the process has exited.
type Drain struct {
	mutex  sync.Mutex
	exited bool
	owed   int // bytes that stood in the pipe at the exit: they are never lost
	endsAt time.Time
}

// Begin is told of the exit.
func (d *Drain) Begin(file *os.File) {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	d.exited = true
	d.endsAt = time.Now().Add(drainTotal)
	if raw, err := file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			var n int32
			if sys.Ioctl(int(fd), fionread, uintptr(unsafe.Pointer(&n))) == nil {
				d.owed = int(n)
			}
		})
	}
	_ = file.SetReadDeadline(time.Now().Add(drainIdle))
}

// After tells whether to read on after n bytes.
func (d *Drain) After(n int, file *os.File) bool {
	d.mutex.Lock()
	defer d.mutex.Unlock()
	if !d.exited {
		return true
	}
	d.owed -= n
	now := time.Now()
	if d.owed <= 0 && now.After(d.endsAt) {
		return false
	}
	_ = file.SetReadDeadline(now.Add(drainIdle))
	return true
}

func (j *job) pump(out output, d *Drain) {
	buffer := make([]byte, stream.HeaderBytes+stream.MaxPayload)
	gone := false
	for {
		n, err := out.file.Read(buffer[stream.HeaderBytes:])
		if n > 0 {
			// After a hang-up the rest is read and dropped, so that a process that tidies up on SIGHUP is
			// not killed by SIGPIPE.
			if !gone && j.s.SendPrepared(out.kind, buffer[:stream.HeaderBytes+n]) != nil {
				gone = true
			}
			if !d.After(n, out.file) {
				return
			}
		}
		if err != nil {
			return // EOF, EIO of a pty whose slaves are closed, or the deadline
		}
	}
}

// signalGroup signals the process group. Its number may be used again once the leader is waited for:
// the mutex keeps that from happening between the check and the kill (but for the instant within Wait).
func (j *job) signalGroup(number syscall.Signal) {
	j.exitMutex.Lock()
	defer j.exitMutex.Unlock()
	if !j.hasExited() {
		_ = syscall.Kill(-j.Process.Pid, number)
	}
}

// cancel ends the process of a stream that is over; the rest happens behind the port's back.
func (j *job) cancel() {
	j.signalGroup(syscall.SIGHUP)
	if j.Master != nil {
		j.Master.Close() // the kernel hangs the terminal up
	} else if j.Input != nil {
		j.stdinQueue().stop()
	}
	go func() {
		time.Sleep(hangUpGrace)
		KillSession(j.Process.Pid)
	}()
	close(j.cancelled)
}

// KillSession sends SIGKILL to every process of a session, a few times over: one may fork meanwhile.
func KillSession(sid int) {
	for try := 0; try < 5; try++ {
		pids := SessionPids(sid)
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// SessionPids lists the living processes of a session.
func SessionPids(sid int) (pids []int) {
	for _, pid := range Pids() {
		if session(pid) == sid {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Pids lists all processes.
func Pids() []int {
	directory, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer directory.Close()
	names, _ := directory.Readdirnames(-1)
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// session returns the session id of a living process, 0 where there is none.
func session(pid int) int {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	text := string(raw)
	// The name stands in parentheses and may itself hold spaces and parentheses.
	i := strings.LastIndexByte(text, ')')
	if i < 0 {
		return 0
	}
	fields := strings.Fields(text[i+1:])
	if len(fields) < 4 || fields[0] == "Z" {
		return 0
	}
	sid, _ := strconv.Atoi(fields[3])
	return sid
}

// frame takes a frame of the host.
func (j *job) frame(f stream.Frame) error {
	switch f.Type {
	case stream.Stdin:
		if j.Input == nil {
			return nil
		}
		return j.stdinQueue().push(f.Payload)
	case stream.StdinEOF:
		if j.Input != nil {
			j.stdinQueue().end()
		}
	case stream.Resize:
		j.Resize(f.Payload)
	case stream.Signal:
		if number := SignalNumber(f.Payload); number != 0 {
			j.signalGroup(number)
		}
	}
	return nil
}

var stdinQueueMutex sync.Mutex

func (j *job) stdinQueue() *stdinQueue {
	stdinQueueMutex.Lock()
	defer stdinQueueMutex.Unlock()
	if j.stdin == nil {
		j.stdin = &stdinQueue{wake: make(chan struct{}, 1)}
	}
	return j.stdin
}

// stdinQueue holds what the host sent and the process has not read; the credit bounds it.
type stdinQueue struct {
	mutex   sync.Mutex
	pending []byte
	unpaid  int // taken from the host, not given back as credit
	ended   bool
	stopped bool
	broken  bool
	wake    chan struct{}
}

func (q *stdinQueue) notify() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

func (q *stdinQueue) push(data []byte) error {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	if q.ended || q.stopped {
		return nil
	}
	if q.unpaid+len(data) > stream.StdinWindow {
		return fmt.Errorf("%w: more STDIN than credit", stream.ErrProtocol)
	}
	q.unpaid += len(data)
	q.pending = append(q.pending, data...)
	q.notify()
	return nil
}

func (q *stdinQueue) end() {
	q.mutex.Lock()
	q.ended = true
	q.mutex.Unlock()
	q.notify()
}

func (q *stdinQueue) stop() {
	q.mutex.Lock()
	q.stopped = true
	q.mutex.Unlock()
	q.notify()
}

func (q *stdinQueue) start(j *job) {
	go func() {
		defer func() {
			if j.Input != j.Master {
				j.Input.Close()
			}
		}()
		spare := []byte(nil)
		for range q.wake {
			for {
				q.mutex.Lock()
				data, ended, stopped := q.pending, q.ended, q.stopped
				q.pending = spare[:0]
				q.mutex.Unlock()
				if stopped {
					return
				}
				if len(data) == 0 {
					spare = data
					if !ended {
						break
					}
					if j.Input == j.Master {
						_, _ = j.Master.Write([]byte{4}) // VEOF
					}
					return
				}
				for start := 0; start < len(data); start += stream.MaxPayload {
					stop := start + stream.MaxPayload
					if stop > len(data) {
						stop = len(data)
					}
					if !q.broken {
						// A reader that is gone takes nothing, yet the host must not get stuck.
						if _, err := j.Input.Write(data[start:stop]); err != nil {
							q.broken = true
						}
					}
					var credit [4]byte
					binary.BigEndian.PutUint32(credit[:], uint32(stop-start))
					q.mutex.Lock()
					q.unpaid -= stop - start
					q.mutex.Unlock()
					if !j.hasExited() {
						_ = j.s.Send(stream.StdinCredit, credit[:])
					}
				}
				spare = data
			}
		}
	}()
}

func (j *job) detach(place *place) error {
	directory := LogDirectory
	if err := os.MkdirAll(directory, 0o755); err != nil {
		directory = "/run/banger" // a file system that is read-only, or odd
		if os.MkdirAll(directory, 0o755) != nil {
			return err
		}
	}
	null, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(null)
	reader, writer, err := pipe("log", true)
	if err != nil {
		return err
	}
	defer syscall.Close(writer)
	id := fmt.Sprintf("%x", time.Now().UnixNano())
	path := directory + "/" + id + ".log"
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o640)
	if err != nil {
		reader.Close()
		return err
	}
	process, err := spawn(j.request, place, [3]uintptr{uintptr(null), uintptr(writer), uintptr(writer)})
	if err != nil {
		reader.Close()
		log.Close()
		os.Remove(path)
		var failure *notStarted
		if errors.As(err, &failure) {
			return stream.Failed("not_found", "%s", failure.message)
		}
		return err
	}
	go func() { // keeps reading beyond the limit: a full pipe would stop the process
		defer reader.Close()
		defer log.Close()
		if _, err := io.Copy(log, io.LimitReader(reader, detachedLimit)); err == nil {
			_, _ = io.Copy(io.Discard, reader)
		}
	}()
	pid := process.Pid
	go func() {
		if j.request.TimeoutS > 0 {
			timer := time.AfterFunc(time.Duration(j.request.TimeoutS*float64(time.Second)), func() { KillSession(pid) })
			defer timer.Stop()
		}
		_, _ = process.Wait()
	}()
	if err := j.s.SendJSON(stream.Started, map[string]interface{}{"pid": pid, "id": id, "log": path}); err != nil {
		return err
	}
	return j.s.Finish(nil)
}
