package session

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"sort"
	"sync"
	"syscall"
	"time"

	"banger/agent/exec"
	"banger/agent/stream"
	"banger/agent/system"
)

const (
	minLimit     = 64 << 10
	maxLimit     = 1 << 30
	defaultLimit = 16 << 20
	maxSessions  = 64 // so many fit into one frame
	maxShown     = 4 << 10
	maxListed    = 192
	maxGrace     = 3600
)

// Directory is where sessions are kept; Fallback where that cannot be written.
var (
	Directory = "/var/lib/banger/sessions"
	Fallback  = "/run/banger/sessions"
)

var (
	keeper   sync.Mutex
	sessions = map[string]*session{}
)

// Load takes up the sessions of before.
func Load() {
	keeper.Lock()
	defer keeper.Unlock()
	if os.MkdirAll(Directory, 0o700) != nil {
		Directory = Fallback
		_ = os.MkdirAll(Directory, 0o700)
	}
	entries, _ := os.ReadDir(Directory)
	for _, entry := range entries {
		path := Directory + "/" + entry.Name()
		x, foreign := restore(path)
		if foreign {
			_ = os.RemoveAll(path)
		} else if x != nil && x.body.Name == entry.Name() && len(sessions) < maxSessions {
			sessions[entry.Name()] = x
		}
	}
}

func validName(name string) bool {
	if len(name) < 1 || len(name) > 64 {
		return false
	}
	for i, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
}

type request struct {
	Op        string    `json:"op"`
	Name      string    `json:"name"`
	StdinMode string    `json:"stdin_mode"`
	TTY       *exec.TTY `json:"tty"`
	Restart   string    `json:"restart"`
	LogLimit  int64     `json:"log_limit"`
	Ready     *struct {
		Port    int      `json:"port"`
		File    string   `json:"file"`
		Command []string `json:"command"`
	} `json:"ready"`
	Until    string   `json:"until"`
	TimeoutS *float64 `json:"timeout_s"`
	Number   int      `json:"number"`
	GraceS   *float64 `json:"grace_s"`
	Force    bool     `json:"force"`
	ReadOnly bool     `json:"read_only"`
	Follow   bool     `json:"follow"`
	Stdout   *int64   `json:"stdout"`
	Stderr   *int64   `json:"stderr"`
	WaitS    float64  `json:"wait_s"`
	UnixS    int64    `json:"unix_s"`
}

// Handle serves a session request.
func Handle(s *stream.Stream, raw []byte) error {
	var r request
	if err := stream.Decode(raw, &r); err != nil {
		return err
	}
	switch r.Op {
	case "start":
		return start(s, raw, &r)
	case "list":
		return list(s)
	}
	keeper.Lock()
	x := sessions[r.Name]
	keeper.Unlock()
	if x == nil {
		return stream.Failed("not_found", "no session %q", r.Name)
	}
	switch r.Op {
	case "show":
		return x.answer(s)
	case "wait":
		return wait(s, x, &r)
	case "signal":
		if r.Number < 1 || r.Number > 64 {
			return stream.Failed("bad_request", "signal %d", r.Number)
		}
		if err := x.signal(syscall.Signal(r.Number)); err != nil {
			return err
		}
		return x.answer(s)
	case "stop", "kill":
		grace := 10.0
		if r.GraceS != nil {
			grace = *r.GraceS
		}
		if !(grace >= 0 && grace <= maxGrace) {
			return stream.Failed("bad_request", "grace_s %v", grace)
		}
		reason := "stopped"
		if r.Op == "kill" {
			reason, grace = "killed", 0
		}
		return s.Work(func() error {
			if err := x.end(reason, time.Duration(grace*float64(time.Second))); err != nil {
				return err
			}
			return x.answer(s)
		}, nil, func() {})
	case "remove":
		return s.Work(func() error { return remove(s, x, r.Force) }, nil, func() {})
	case "since":
		return s.Finish(map[string]int64{"stdout": x.outputs[0].at(r.UnixS), "stderr": x.outputs[1].at(r.UnixS)})
	case "attach":
		return attach(s, x, &r)
	}
	return stream.Failed("unsupported", "session op %q", r.Op)
}

func (x *session) answer(s *stream.Stream) error {
	return s.Finish(map[string]interface{}{"session": x.snapshot().clipped(maxShown)})
}

func list(s *stream.Stream) error {
	keeper.Lock()
	all := make([]body, 0, len(sessions))
	for _, x := range sessions {
		if x != nil {
			all = append(all, x.snapshot().clipped(maxListed))
		}
	}
	keeper.Unlock()
	sort.Slice(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	return s.Finish(map[string]interface{}{"sessions": all})
}

// clipped shortens what a user may make as long as he likes: an object has to fit into a frame.
func (b body) clipped(limit int) body {
	words, left := []string{}, limit
	for _, word := range b.Argv {
		if len(word) > left {
			break
		}
		words, left = append(words, word), left-len(word)
	}
	b.Argv = words
	if len(b.Cwd) > 2*maxShown {
		b.Cwd = ""
	}
	if limit < maxShown && len(b.Cwd) > limit {
		b.Cwd = ""
	}
	if len(b.Message) > limit {
		b.Message = b.Message[:limit]
	}
	return b
}

func start(s *stream.Stream, raw []byte, r *request) error {
	process, err := exec.ParseRequest(raw)
	if err != nil {
		return err
	}
	if !validName(r.Name) {
		return stream.Failed("bad_request", "a session's name %q", r.Name)
	}
	process.Detach, process.TimeoutS = false, 0
	switch r.StdinMode {
	case "", "pipe":
		r.StdinMode, process.Stdin, process.TTY = "pipe", true, nil
	case "null":
		process.Stdin, process.TTY = false, nil
	case "pty":
		if process.Stdin = true; process.TTY == nil {
			process.TTY = &exec.TTY{Rows: 24, Cols: 80}
		}
	default:
		return stream.Failed("bad_request", "stdin_mode %q", r.StdinMode)
	}
	if r.Restart == "" {
		r.Restart = "no"
	}
	if r.Restart != "no" && r.Restart != "on-failure" {
		return stream.Failed("bad_request", "restart %q", r.Restart)
	}
	if r.LogLimit == 0 {
		r.LogLimit = defaultLimit
	}
	if r.LogLimit < minLimit || r.LogLimit > maxLimit {
		return stream.Failed("bad_request", "log_limit %d", r.LogLimit)
	}
	check, err := parseReady(r)
	if err != nil {
		return err
	}
	if !process.ExactEnv && process.Env["BANGER_SESSION"] == "" {
		process.Env["BANGER_SESSION"] = r.Name
	}
	if process.User == "" {
		process.User = "root"
	}
	b := body{
		Name: r.Name, ID: fmt.Sprintf("%x", time.Now().UnixNano()), User: process.User, StdinMode: r.StdinMode, Restart: r.Restart,
		LogLimit: r.LogLimit, Boot: system.BootID(), Machine: machineID(),
	}
	for _, word := range process.Argv {
		b.Argv = append(b.Argv, base64.StdEncoding.EncodeToString([]byte(word)))
	}
	if check != nil {
		no := false
		b.Ready = &no
	}
	directory := Directory + "/" + b.Name
	if err := claim(b.Name); err != nil {
		return err
	}
	_ = os.RemoveAll(directory) // what did not read when the agent began
	x := newSession(directory, b)
	x.request, x.tree = process, newTree(b.ID)
	err = os.MkdirAll(directory, 0o700)
	if err == nil {
		err = x.begin(check)
	}
	keeper.Lock()
	if err == nil {
		sessions[b.Name] = x
	} else {
		delete(sessions, b.Name)
	}
	keeper.Unlock()
	if err != nil {
		x.tree.remove()
		_ = os.RemoveAll(directory)
		return err
	}
	return x.answer(s)
}

// claim takes a name, under which nothing is found until the session has begun.
func claim(name string) error {
	keeper.Lock()
	defer keeper.Unlock()
	if _, taken := sessions[name]; taken {
		return stream.Failed("exists", "there is a session %q", name)
	}
	if len(sessions) >= maxSessions {
		return stream.Failed("busy", "there are %d sessions", maxSessions)
	}
	sessions[name] = nil
	return nil
}

func parseReady(r *request) (*readiness, error) {
	if r.Ready == nil {
		return nil, nil
	}
	check := &readiness{port: r.Ready.Port}
	asked := 0
	if r.Ready.Port != 0 {
		asked++
	}
	if r.Ready.File != "" {
		path, err := exec.FromBase64(r.Ready.File)
		if err != nil {
			return nil, err
		}
		check.file = path
		asked++
	}
	for _, word := range r.Ready.Command {
		plain, err := exec.FromBase64(word)
		if err != nil {
			return nil, err
		}
		check.command = append(check.command, plain)
	}
	if len(check.command) > 0 {
		asked++
	}
	if asked != 1 || check.port < 0 || check.port > 65535 {
		return nil, stream.Failed("bad_request", "a ready check is one port, file or command")
	}
	return check, nil
}

func wait(s *stream.Stream, x *session, r *request) error {
	if r.Until != "end" && r.Until != "ready" {
		return stream.Failed("bad_request", "until %q", r.Until)
	}
	var timeout <-chan time.Time
	if r.TimeoutS != nil {
		if !(*r.TimeoutS >= 0 && *r.TimeoutS < 1e9) {
			return stream.Failed("bad_request", "timeout_s %v", *r.TimeoutS)
		}
		timer := time.NewTimer(time.Duration(*r.TimeoutS * float64(time.Second)))
		defer timer.Stop()
		timeout = timer.C
	}
	cancelled := make(chan struct{})
	return s.Work(func() error {
		late := false
		for {
			x.mutex.Lock()
			so := x.body.State == ended || x.removed
			if r.Until == "ready" && (x.body.Ready == nil || *x.body.Ready) {
				so = true
			}
			change := x.change()
			x.mutex.Unlock()
			if so || late {
				return s.Finish(map[string]interface{}{"session": x.snapshot().clipped(maxShown), "timed_out": !so})
			}
			select {
			case <-change:
			case <-timeout:
				late = true
			case <-cancelled:
				return nil
			}
		}
	}, nil, func() { close(cancelled) })
}

func remove(s *stream.Stream, x *session, force bool) error {
	if !x.isEnded() {
		if !force {
			return stream.Failed("busy", "the session %s runs", x.body.Name)
		}
		if err := x.end("killed", 0); err != nil {
			return err
		}
	}
	<-x.done
	x.mutex.Lock()
	x.removed = true
	x.notify()
	x.mutex.Unlock()
	err := os.RemoveAll(x.directory)
	keeper.Lock()
	if sessions[x.body.Name] == x {
		delete(sessions, x.body.Name)
	}
	keeper.Unlock()
	if err != nil {
		return err
	}
	return s.Finish(nil)
}

// viewer is one stream that is attached.
type viewer struct {
	s         *stream.Stream
	x         *session
	r         *request
	owed      int // credit to give back; the session's mutex guards it
	cancelled chan struct{}
}

func attach(s *stream.Stream, x *session, r *request) error {
	if !(r.WaitS >= 0 && r.WaitS <= maxGrace) {
		return stream.Failed("bad_request", "wait_s %v", r.WaitS)
	}
	v := &viewer{s: s, x: x, r: r, cancelled: make(chan struct{})}
	return s.Work(v.run, v.frame, func() { close(v.cancelled) })
}

// enter makes it the writer, where it wants to be, and returns the credit it begins with.
func (v *viewer) enter() (credit int, err error) {
	x := v.x
	deadline := time.NewTimer(time.Duration(v.r.WaitS * float64(time.Second)))
	defer deadline.Stop()
	for late := false; ; {
		x.mutex.Lock()
		if v.r.ReadOnly || x.body.State == ended {
			break
		}
		if x.writer == nil {
			x.writer, v.owed = v, 0
			credit = stream.StdinWindow - x.queued
			break
		}
		change := x.change()
		x.mutex.Unlock()
		if late {
			return 0, stream.Failed("busy", "the session %s has a writer", x.body.Name)
		}
		select {
		case <-change:
		case <-deadline.C:
			late = true
		case <-v.cancelled:
			return 0, stream.Failed("cancelled", "cancelled")
		}
	}
	x.body.Viewers++
	x.notify()
	x.mutex.Unlock()
	return credit, nil
}

func (v *viewer) leave() {
	x := v.x
	x.mutex.Lock()
	defer x.mutex.Unlock()
	x.body.Viewers--
	if x.writer == v {
		x.writer = nil
	}
	x.notify()
}

// run sends what there is, and what comes.
func (v *viewer) run() error {
	credit, err := v.enter()
	if err != nil {
		return err
	}
	defer v.leave()
	x, s := v.x, v.s
	var readers [2]*reader
	var until [2]int64
	for i, from := range []*int64{v.r.Stdout, v.r.Stderr} {
		_, until[i] = x.outputs[i].span()
		if from == nil {
			continue
		}
		position := *from
		if position < 0 || position > until[i] {
			position = until[i]
		}
		readers[i] = &reader{of: x.outputs[i], position: position}
		defer readers[i].close()
	}
	first := x.snapshot()
	if err := s.SendJSON(stream.Started, map[string]interface{}{"session": first.clipped(maxShown), "credit": credit}); err != nil {
		return err
	}
	seen := first.Restarts
	buffer := make([]byte, stream.HeaderBytes+stream.MaxPayload)
	for {
		x.mutex.Lock()
		change, owed, removed := x.change(), v.owed, x.removed
		state, restarts := x.body.State, x.body.Restarts
		v.owed = 0
		x.mutex.Unlock()
		if owed > 0 {
			var word [4]byte
			binary.BigEndian.PutUint32(word[:], uint32(owed))
			if err := s.Send(stream.StdinCredit, word[:]); err != nil {
				return err
			}
		}
		moved := false
		for i, from := range readers {
			if from == nil {
				continue
			}
			if v.r.Follow {
				_, until[i] = x.outputs[i].span()
			}
			count, missed, err := from.read(buffer[stream.HeaderBytes:], until[i])
			if missed > 0 {
				name := []string{"stdout", "stderr"}[i]
				if err := s.SendJSON(stream.Missed, map[string]interface{}{"stream": name, "bytes": missed}); err != nil {
					return err
				}
			}
			if count > 0 {
				moved = true
				if err := s.SendPrepared([]byte{stream.Stdout, stream.Stderr}[i], buffer[:stream.HeaderBytes+count]); err != nil {
					return err
				}
			}
			if err != nil && !removed {
				return err
			}
		}
		if moved {
			continue // also of an end it is said only after all that came before
		}
		if restarts != seen {
			seen = restarts
			if err := s.SendJSON(stream.Restarted, x.snapshot().clipped(maxShown)); err != nil {
				return err
			}
		}
		if removed {
			return x.answer(s)
		}
		if state == ended {
			last := x.snapshot()
			if last.Exit != nil {
				if err := s.SendJSON(stream.Exit, last.Exit); err != nil {
					return err
				}
			}
			return x.answer(s)
		}
		if !v.r.Follow {
			return x.answer(s)
		}
		select {
		case <-change:
		case <-v.cancelled:
			return nil
		}
	}
}

// frame takes a frame of the host. Only the writer's do anything.
func (v *viewer) frame(f stream.Frame) error {
	switch f.Type {
	case stream.Stdin:
		return v.x.push(v, f.Payload)
	case stream.StdinEOF:
		v.x.pushEnd(v)
	case stream.Resize, stream.Signal:
		v.x.mutex.Lock()
		child, writes := v.x.child, v.x.writer == v
		v.x.mutex.Unlock()
		if !writes || child == nil {
			return nil
		}
		if f.Type == stream.Resize {
			child.Resize(f.Payload)
		} else if number := exec.SignalNumber(f.Payload); number != 0 {
			_ = v.x.signal(number)
		}
	}
	return nil
}
