// Package session keeps processes that belong to nobody's stream, and what they said.
package session

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger/agent/exec"
	"banger/agent/stream"
	"banger/agent/system"
)

const (
	firstPause  = 500 * time.Millisecond
	lastPause   = 30 * time.Second
	longRun     = 10 * time.Second // after it the pauses between restarts begin anew
	stuckLimit  = 10 * time.Second
	endingGrace = 200 * time.Millisecond
)

// States and reasons of PROTOCOL.md.
const (
	running    = "running"
	restarting = "restarting"
	ended      = "ended"
)

// body is the session object of PROTOCOL.md, and what is on disk of it.
type body struct {
	Name      string         `json:"name"`
	ID        string         `json:"id"`
	Argv      []string       `json:"argv"`
	Cwd       string         `json:"cwd"`
	User      string         `json:"user"`
	StdinMode string         `json:"stdin_mode"`
	Restart   string         `json:"restart"`
	State     string         `json:"state"`
	Pid       *int           `json:"pid"`
	Ready     *bool          `json:"ready"`
	StartedAt int64          `json:"started_at"`
	BeganAt   int64          `json:"began_at"`
	EndedAt   *int64         `json:"ended_at"`
	Exit      *exec.ExitBody `json:"exit"`
	Reason    string         `json:"reason"`
	Message   string         `json:"message"`
	Restarts  int            `json:"restarts"`
	LogLimit  int64          `json:"log_limit"`
	Viewers   int            `json:"viewers"`
	Writer    bool           `json:"writer"`
	Closed    bool           `json:"stdin_closed"`
	Stdout    span           `json:"stdout"`
	Stderr    span           `json:"stderr"`
	Boot      string         `json:"boot,omitempty"`
	Machine   string         `json:"machine,omitempty"`
}

type span struct {
	Start int64 `json:"start"`
	End   int64 `json:"end"`
}

type session struct {
	directory string
	request   *exec.Request
	outputs   [2]*output
	tree      *tree
	stop      chan struct{} // closed when it is to end
	done      chan struct{} // closed when it has ended

	mutex    sync.Mutex
	changed  chan struct{} // closed at the next change; nil when nobody waits
	input    *sync.Cond
	body     body
	child    *exec.Child // nil while none runs
	queue    []chunk
	queued   int // bytes of it, and those that are being written
	lost     int // bytes of `queued` that a process did not live to take
	closed   bool
	stopping string
	removed  bool
	writer   *viewer
}

// chunk is input on its way to the process; without data it is the end of it.
type chunk struct{ data []byte }

// notify wakes everybody who waits for a change. The mutex is held.
func (x *session) notify() {
	if x.changed != nil {
		close(x.changed)
		x.changed = nil
	}
}

// change returns what the next notify closes. The mutex is held.
func (x *session) change() chan struct{} {
	if x.changed == nil {
		x.changed = make(chan struct{})
	}
	return x.changed
}

func (x *session) snapshot() body {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	b := x.body
	b.Boot, b.Machine = "", ""
	b.Writer, b.Closed = x.writer != nil, x.closed
	b.Stdout.Start, b.Stdout.End = x.outputs[0].span()
	b.Stderr.Start, b.Stderr.End = x.outputs[1].span()
	return b
}

func (x *session) isEnded() bool {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	return x.body.State == ended
}

// save writes the record, in one step. What is not on disk is lost with the machine only.
func (x *session) save() {
	x.mutex.Lock()
	b := x.body
	b.Viewers = 0
	gone := x.removed
	x.mutex.Unlock()
	raw, err := json.Marshal(b)
	if err != nil || gone {
		return
	}
	path := x.directory + "/session.json"
	if os.WriteFile(path+".new", raw, 0o600) == nil {
		_ = os.Rename(path+".new", path)
	}
}

// begin starts the process for the first time.
func (x *session) begin(ready *readiness) error {
	x.request.Within = x.tree.within
	child, err := exec.Start(x.request)
	if err != nil {
		return err
	}
	now := time.Now().Unix()
	x.body.StartedAt = now
	x.body.Cwd = base64.StdEncoding.EncodeToString([]byte(child.Cwd))
	x.running(child)
	x.save()
	if ready != nil {
		go x.becomeReady(ready)
	}
	go x.supervise(child)
	return nil
}

func (x *session) running(child *exec.Child) {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	pid := child.Process.Pid
	atomic.StoreInt64(&x.tree.sid, int64(pid))
	x.child, x.closed = child, false
	x.body.State, x.body.Pid, x.body.BeganAt = running, &pid, time.Now().Unix()
	x.notify()
}

// supervise waits for the process, and starts it again where that is asked for.
func (x *session) supervise(child *exec.Child) {
	defer close(x.done)
	pause := firstPause
	for {
		began := time.Now()
		exit := x.follow(child)
		x.mutex.Lock()
		x.body.Exit, x.body.Pid = &exit, nil
		if x.stopping == "" && system.Ending() {
			x.stopping = "machine"
		}
		failed := exit.Code == nil || *exit.Code != 0
		again := x.stopping == "" && x.body.Restart == "on-failure" && failed
		if again {
			x.body.State = restarting
			x.dropInput()
			x.notify()
		}
		x.mutex.Unlock()
		if !again {
			break
		}
		x.save()
		if time.Since(began) >= longRun {
			pause = firstPause
		}
		select {
		case <-x.stop:
		case <-time.After(pause):
		}
		if pause *= 2; pause > lastPause {
			pause = lastPause
		}
		x.mutex.Lock()
		stopped := x.stopping != ""
		x.mutex.Unlock()
		if stopped {
			break
		}
		next, err := exec.Start(x.request)
		if err != nil {
			x.mutex.Lock()
			x.body.Reason, x.body.Message = "not_started", stream.AsFailure(err).Message
			x.mutex.Unlock()
			break
		}
		child = next
		x.mutex.Lock()
		x.body.Restarts++
		x.mutex.Unlock()
		x.running(child)
		x.save()
	}
	x.tree.remove()
	x.mutex.Lock()
	now := time.Now().Unix()
	x.body.State, x.body.EndedAt = ended, &now
	if x.stopping != "" {
		x.body.Reason = x.stopping
	}
	x.queue = nil // no credit for it: that would say that it was taken
	x.notify()
	x.mutex.Unlock()
	for _, out := range x.outputs {
		out.mutex.Lock()
		out.endSegment()
		out.mutex.Unlock()
	}
	x.save()
}

// follow sees one run of the process to its end and to the end of what it says.
func (x *session) follow(child *exec.Child) exec.ExitBody {
	var pumps, feeding sync.WaitGroup
	if child.Input != nil {
		feeding.Add(1)
		go func() {
			defer feeding.Done()
			x.feed(child)
		}()
	}
	files := []*os.File{child.Stdout, child.Stderr}
	drains := make([]exec.Drain, len(files))
	for i, file := range files {
		if file == nil {
			continue
		}
		pumps.Add(1)
		go func(i int, file *os.File) {
			defer pumps.Done()
			x.pump(x.outputs[i], file, &drains[i])
		}(i, file)
	}
	state, err := child.Process.Wait()
	x.mutex.Lock()
	x.child = nil
	x.input.Broadcast()
	x.mutex.Unlock()
	// A session is its process: what that one leaves behind would hold the ports of the next.
	x.tree.end(leftoverPatient, child.Master != nil)
	for i, file := range files {
		if file != nil {
			drains[i].Begin(file)
		}
	}
	pumps.Wait()
	child.Close()
	feeding.Wait() // its last word on what was taken comes before that of the end
	if err != nil {
		unknown := 255
		return exec.ExitBody{Code: &unknown}
	}
	return exec.ExitOf(state)
}

func (x *session) pump(out *output, file *os.File, drain *exec.Drain) {
	buffer := make([]byte, stream.MaxPayload)
	for {
		n, err := file.Read(buffer)
		if n > 0 {
			out.add(buffer[:n])
			x.mutex.Lock()
			x.notify()
			x.mutex.Unlock()
			if !drain.After(n, file) {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// push takes input from the writer.
func (x *session) push(v *viewer, data []byte) error {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	if x.writer != v {
		return nil
	}
	if x.queued+len(data) > stream.StdinWindow {
		return fmt.Errorf("%w: more STDIN than credit", stream.ErrProtocol)
	}
	x.queued += len(data)
	if x.body.State == ended || x.closed || x.body.StdinMode == "null" {
		x.taken(len(data))
		return nil
	}
	x.queue = append(x.queue, chunk{append([]byte(nil), data...)})
	x.input.Broadcast()
	return nil
}

func (x *session) pushEnd(v *viewer) {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	if x.writer == v {
		x.queue = append(x.queue, chunk{})
		x.input.Broadcast()
	}
}

// taken gives credit back: to whoever writes now. The mutex is held.
func (x *session) taken(count int) {
	x.queued -= count
	if x.writer != nil && count > 0 {
		x.writer.owed += count
		x.notify()
	}
}

// dropInput forgets what was meant for a process that begins again. The mutex is held.
func (x *session) dropInput() {
	for _, c := range x.queue {
		x.taken(len(c.data))
	}
	x.queue = nil
	x.taken(x.lost)
	x.lost = 0
}

// feed writes the input of one run.
func (x *session) feed(child *exec.Child) {
	for {
		x.mutex.Lock()
		for len(x.queue) == 0 && x.child == child {
			x.input.Wait()
		}
		if x.child != child {
			x.mutex.Unlock()
			return
		}
		data := x.queue[0].data
		x.queue = x.queue[1:]
		closed, lost := x.closed, false
		x.mutex.Unlock()
		switch {
		case closed:
		case data == nil && child.Master != nil:
			_, _ = child.Master.Write([]byte{4}) // VEOF
		case data == nil:
			child.Input.Close()
		default:
			if _, err := child.Input.Write(data); err != nil {
				closed = true // a reader that is gone takes nothing, yet nobody must get stuck
				lost = x.ends(child)
			}
		}
		x.mutex.Lock()
		if x.child == child {
			x.closed = closed || (data == nil && child.Master == nil)
		}
		if lost {
			x.lost += len(data)
		} else {
			x.taken(len(data))
		}
		x.mutex.Unlock()
	}
}

// ends tells a process that is ending from one that has closed its input: that is known a little later.
func (x *session) ends(child *exec.Child) bool {
	for deadline := time.Now().Add(endingGrace); ; time.Sleep(5 * time.Millisecond) {
		x.mutex.Lock()
		gone := x.child != child
		x.mutex.Unlock()
		if gone || time.Now().After(deadline) {
			return gone
		}
	}
}

// signal signals the process group of what runs.
func (x *session) signal(number syscall.Signal) error {
	x.mutex.Lock()
	defer x.mutex.Unlock()
	if x.child == nil {
		return stream.Failed("ended", "the session %s does not run", x.body.Name)
	}
	if err := syscall.Kill(-x.child.Process.Pid, number); err != nil && err != syscall.ESRCH {
		return err
	}
	return nil
}

// end ends it and all its processes; it returns when there are none.
func (x *session) end(reason string, patience time.Duration) error {
	x.mutex.Lock()
	if x.stopping == "" && x.body.State != ended {
		x.stopping = reason
		close(x.stop)
	}
	x.mutex.Unlock()
	select {
	case <-x.done:
		return nil
	default:
	}
	// Again: a restart may have been under way.
	for deadline := time.Now().Add(patience + stuckLimit); time.Now().Before(deadline); patience = 0 {
		x.tree.end(patience, x.body.StdinMode == "pty")
		select {
		case <-x.done:
			return nil
		case <-time.After(endingGrace):
		}
	}
	return stream.Failed("io", "a process of the session %s does not end", x.body.Name)
}

func newSession(directory string, b body) *session {
	x := &session{directory: directory, body: b, stop: make(chan struct{}), done: make(chan struct{})}
	x.input = sync.NewCond(&x.mutex)
	for i, name := range []string{"stdout", "stderr"} {
		x.outputs[i] = loadOutput(directory+"/"+name, b.LogLimit)
	}
	return x
}

func machineID() string {
	raw, _ := os.ReadFile(exec.Etc + "/machine-id")
	if len(raw) > 64 {
		raw = raw[:64]
	}
	return string(raw)
}

// restore takes up what an agent before this one has left: the record, for its processes are gone. `foreign` is one of
// the machine that this one's image was made from.
func restore(directory string) (x *session, foreign bool) {
	raw, err := os.ReadFile(directory + "/session.json")
	var b body
	if err != nil || json.Unmarshal(raw, &b) != nil || !validName(b.Name) || b.LogLimit < minLimit || b.LogLimit > maxLimit {
		return nil, false
	}
	if b.Machine != machineID() {
		return nil, true
	}
	x = newSession(directory, b)
	if b.State != ended {
		if b.Boot == system.BootID() {
			t := newTree(b.ID)
			t.end(0, false)
			t.remove()
		}
		now := time.Now().Unix()
		x.body.State, x.body.Reason, x.body.Pid, x.body.EndedAt = ended, "machine", nil, &now
		x.save()
	}
	close(x.done)
	return x, false
}
