package stream

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sort"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	helloTimeout   = 10 * time.Second
	requestTimeout = 30 * time.Second
)

// Failure is an error with a code of PROTOCOL.md.
type Failure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (f *Failure) Error() string { return f.Code + ": " + f.Message }

// Failed makes a Failure.
func Failed(code, format string, arguments ...interface{}) *Failure {
	return &Failure{code, fmt.Sprintf(format, arguments...)}
}

// AsFailure gives any error a code.
func AsFailure(err error) *Failure {
	var failure *Failure
	if errors.As(err, &failure) {
		return failure
	}
	code := "io"
	switch {
	case errors.Is(err, os.ErrNotExist):
		code = "not_found"
	case errors.Is(err, os.ErrExist):
		code = "exists"
	case errors.Is(err, os.ErrPermission):
		code = "permission"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		code = "no_space"
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP):
		code = "not_a_directory"
	case errors.Is(err, ErrProtocol):
		code = "protocol"
	}
	return &Failure{code, err.Error()}
}

var (
	errBye      = errors.New("the host said BYE")
	errNewHello = errors.New("the host said HELLO again")
)

// Handler serves one request. It returns nil after it sent END, or an error that becomes ERROR; an
// error of Stream.Next is returned as it is.
type Handler func(s *Stream, request []byte) error

// Server answers streams.
type Server struct {
	Handlers     map[string]Handler
	AgentVersion string
	BootID       string
	Mode         string
	Uptime       func() float64
	Log          func(format string, arguments ...interface{})

	mutex sync.Mutex
	ports map[string]*Port
}

// Port is what STREAMS tells about one port.
type Port struct {
	name    string
	busy    int32
	hangups uint64
}

// PortState is one entry of the answer to STREAMS.
type PortState struct {
	Name    string `json:"name"`
	State   string `json:"state"`
	Hangups uint64 `json:"hangups"`
}

// AddPort registers a port by name; the same name again gives the same Port.
func (srv *Server) AddPort(name string) *Port {
	srv.mutex.Lock()
	defer srv.mutex.Unlock()
	if srv.ports == nil {
		srv.ports = map[string]*Port{}
	}
	if srv.ports[name] == nil {
		srv.ports[name] = &Port{name: name}
	}
	return srv.ports[name]
}

// PortStates returns all ports in the order of their names.
func (srv *Server) PortStates() []PortState {
	srv.mutex.Lock()
	defer srv.mutex.Unlock()
	states := make([]PortState, 0, len(srv.ports))
	for _, port := range srv.ports {
		state := "idle"
		if atomic.LoadInt32(&port.busy) != 0 {
			state = "busy"
		}
		states = append(states, PortState{port.name, state, atomic.LoadUint64(&port.hangups)})
	}
	sort.Slice(states, func(i, j int) bool {
		a, b := states[i].Name, states[j].Name
		if len(a) != len(b) {
			return len(a) < len(b)
		}
		return a < b
	})
	return states
}

// ServePort serves a virtio-serial port until it fails (hot unplug).
func (srv *Server) ServePort(link Link, port *Port) error {
	reader := NewReader(link)
	for {
		err := srv.serve(link, reader, port)
		atomic.StoreInt32(&port.busy, 0)
		switch {
		case err == nil, errors.Is(err, ErrProtocol):
			// Framing is lost, the port is not: look for the next HELLO.
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			atomic.AddUint64(&port.hangups, 1)
			reader.Reset(link)
		case errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.EBADF), errors.Is(err, os.ErrClosed):
			return err
		default:
			// A failed write: the reader has yet to see that hang-up. The pause bounds what cannot be.
			srv.Log("port %s: %v", port.name, err)
			time.Sleep(time.Millisecond)
		}
	}
}

// ServeConnection serves a socket until its end.
func (srv *Server) ServeConnection(link Link, port *Port) {
	if port == nil {
		port = &Port{}
	}
	_ = link.SetReadDeadline(time.Now().Add(helloTimeout))
	_ = srv.serve(link, NewReader(link), port)
	atomic.StoreInt32(&port.busy, 0)
	atomic.AddUint64(&port.hangups, 1)
	_ = link.Close()
}

// serve runs streams until one of them ends badly.
func (srv *Server) serve(link Link, reader *Reader, port *Port) error {
	for {
		hello, err := reader.ScanHello()
		for hello != nil && err == nil {
			atomic.StoreInt32(&port.busy, 1)
			hello, err = srv.serveStream(link, reader, port, hello)
		}
		atomic.StoreInt32(&port.busy, 0)
		if err != nil {
			return err
		}
	}
}

// serveStream runs one stream to its BYE_OK; it returns a HELLO that came instead of BYE.
func (srv *Server) serveStream(link Link, reader *Reader, port *Port, hello *HelloBody) (*HelloBody, error) {
	s := &Stream{Link: link, Writer: NewWriter(link), reader: reader}
	answer, err := json.Marshal(map[string]interface{}{
		"version": Version, "nonce": hello.Nonce, "agent_version": srv.AgentVersion,
		"boot_id": srv.BootID, "mode": srv.Mode, "uptime": srv.Uptime(),
	})
	if err != nil {
		return nil, err
	}
	if err := s.Send(HelloOK, append([]byte(Magic), answer...)); err != nil {
		return nil, err
	}
	if hello.Version != Version {
		err = Failed("unsupported", "protocol version %d; this agent speaks %d", hello.Version, Version)
	} else {
		err = srv.serveRequest(s)
	}
	for {
		switch {
		case err == nil:
		case errors.Is(err, errBye):
			atomic.StoreInt32(&port.busy, 0)
			return nil, NewWriter(link).Send(ByeOK, nil)
		case errors.Is(err, errNewHello):
			return s.hello, nil
		case errors.Is(err, ErrProtocol):
			_ = NewWriter(link).SendJSON(Error, Failed("protocol", "%v", err))
			return nil, err
		case isHangUp(err):
			return nil, err
		default:
			if sendErr := s.SendJSON(Error, clip(AsFailure(err))); sendErr != nil {
				return nil, sendErr
			}
		}
		// What is in flight is ignored until BYE.
		for err = nil; err == nil; {
			_, err = s.Next()
		}
	}
}

func clip(failure *Failure) *Failure {
	if len(failure.Message) > 4096 {
		return &Failure{failure.Code, failure.Message[:4096]}
	}
	return failure
}

// isHangUp tells whether the error came from the link itself.
func isHangUp(err error) bool {
	var link *linkError
	return errors.As(err, &link)
}

func (srv *Server) serveRequest(s *Stream) (err error) {
	defer func() {
		if p := recover(); p != nil {
			srv.Log("panic in a request: %v\n%s", p, debug.Stack())
			err = Failed("internal", "the agent failed: %v", p)
		}
	}()
	// On a socket silence is a dead peer; a port's deadline would end nothing that a hang-up does not.
	if !s.Link.IsPort() {
		_ = s.Link.SetReadDeadline(time.Now().Add(requestTimeout))
	}
	raw, err := s.readRequest()
	_ = s.Link.SetReadDeadline(time.Time{})
	if err != nil {
		return err
	}
	kind, err := ParseKind(raw)
	if err != nil {
		return err
	}
	handler := srv.Handlers[kind]
	if handler == nil {
		return Failed("unsupported", "request kind %q", kind)
	}
	return handler(s, raw)
}

// ParseKind returns the kind of a request.
func ParseKind(raw []byte) (string, error) {
	var head struct {
		Kind string `json:"kind"`
	}
	if err := json.Unmarshal(raw, &head); err != nil {
		return "", Failed("bad_request", "the request is not JSON: %v", err)
	}
	if head.Kind == "" || len(head.Kind) > 64 {
		return "", Failed("bad_request", "the request has no kind")
	}
	return head.Kind, nil
}

// Decode parses a request into its struct.
func Decode(raw []byte, into interface{}) error {
	if err := json.Unmarshal(raw, into); err != nil {
		return Failed("bad_request", "%v", err)
	}
	return nil
}

// Stream is one stream, from HELLO to BYE.
type Stream struct {
	*Writer
	Link   Link
	reader *Reader
	hello  *HelloBody
	over   error
}

type linkError struct{ err error }

func (e *linkError) Error() string { return e.err.Error() }
func (e *linkError) Unwrap() error { return e.err }

// Next returns the next frame of the request. Any error means that the stream is over for the
// handler: a hang-up, BYE, a new HELLO or nonsense. Only one goroutine may call it.
func (s *Stream) Next() (Frame, error) {
	if s.over != nil {
		return Frame{}, s.over
	}
	frame, err := s.reader.Frame()
	switch {
	case err != nil && errors.Is(err, ErrProtocol):
		s.over = err
	case err != nil:
		s.over = &linkError{err}
	case frame.Type == Bye:
		s.over = errBye
	case frame.Type == Hello:
		if s.hello = parseHello(frame.Payload); s.hello == nil {
			s.over = fmt.Errorf("%w: a HELLO that is none", ErrProtocol)
		} else {
			s.over = errNewHello
		}
	}
	return frame, s.over
}

func (s *Stream) readRequest() ([]byte, error) {
	var raw []byte
	for {
		frame, err := s.Next()
		if err != nil {
			return nil, err
		}
		switch frame.Type {
		case RequestPart, Request:
			if len(raw)+len(frame.Payload) > MaxRequest {
				return nil, Failed("bad_request", "the request is longer than %d bytes", MaxRequest)
			}
			raw = append(raw, frame.Payload...)
			if frame.Type == Request {
				return raw, nil
			}
		default:
			return nil, fmt.Errorf("%w: frame type 0x%02x where REQUEST belongs", ErrProtocol, frame.Type)
		}
	}
}

// Finish sends END with the result.
func (s *Stream) Finish(result interface{}) error {
	if result == nil {
		result = struct{}{}
	}
	return wrapLink(s.SendJSON(End, result))
}

func wrapLink(err error) error {
	if err == nil {
		return nil
	}
	return &linkError{err}
}

// Work runs worker in a goroutine of its own while this one reads frames for it.
//
// frame gets each frame and may be nil. When the stream ends first (hang-up, BYE ...), cancel is called, writes
// are made to fail, and Work waits for the worker. The worker's error is sent as ERROR unless the stream is over.
func (s *Stream) Work(worker func() error, frame func(Frame) error, cancel func()) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		var err error
		func() {
			defer func() {
				if p := recover(); p != nil {
					err = Failed("internal", "the agent failed: %v\n%s", p, debug.Stack())
				}
			}()
			err = worker()
		}()
		if err != nil && !isHangUp(err) {
			_ = s.SendJSON(Error, clip(AsFailure(err)))
		}
	}()
	var err error
	for err == nil {
		var f Frame
		if f, err = s.Next(); err == nil && frame != nil {
			if frameErr := frame(f); frameErr != nil {
				if !errors.Is(frameErr, ErrProtocol) {
					frameErr = &linkError{frameErr}
				}
				err = frameErr
				s.over = frameErr
			}
		}
	}
	if !errors.Is(err, errBye) && !errors.Is(err, ErrProtocol) {
		// The worker may be stuck in a write to a host that is gone. (After BYE the host reads on.)
		_ = s.Link.SetWriteDeadline(time.Unix(1, 0))
		defer s.Link.SetWriteDeadline(time.Time{})
	}
	select {
	case <-done:
	default:
		cancel()
	}
	s.Shut()
	<-done
	return err
}
