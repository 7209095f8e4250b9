package stream

import (
	"errors"
	"io"
	"syscall"
	"testing"
	"time"
)

// pair returns the agent's link and the host's end of a connection.
func pair(t *testing.T) (Link, Link) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := NewLink(fds[0], "agent", false)
	if err != nil {
		t.Fatal(err)
	}
	host, err := NewLink(fds[1], "host", false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); host.Close() })
	_ = host.SetReadDeadline(time.Now().Add(10 * time.Second))
	return ours, host
}

const nonceA, nonceB = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"

// readRaw reads one frame of the agent.
func readRaw(t *testing.T, host Link) (byte, []byte) {
	t.Helper()
	var header [HeaderBytes]byte
	if _, err := io.ReadFull(host, header[:]); err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, int(header[1])<<24|int(header[2])<<16|int(header[3])<<8|int(header[4]))
	if _, err := io.ReadFull(host, payload); err != nil {
		t.Fatal(err)
	}
	return header[0], payload
}

func want(t *testing.T, host Link, kind byte) []byte {
	t.Helper()
	got, payload := readRaw(t, host)
	if got != kind {
		t.Fatalf("frame 0x%02x %q, want 0x%02x", got, payload, kind)
	}
	return payload
}

func hello(t *testing.T, w *Writer, nonce string) {
	t.Helper()
	if err := w.Send(Hello, []byte(Magic+`{"version":1,"nonce":"`+nonce+`"}`)); err != nil {
		t.Fatal(err)
	}
}

func newTestServer() *Server {
	return &Server{Mode: "test", Uptime: func() float64 { return 1 }, Log: func(string, ...interface{}) {},
		Handlers: map[string]Handler{
			"ok":    func(s *Stream, _ []byte) error { return s.Finish(nil) },
			"fail":  func(s *Stream, _ []byte) error { return Failed("io", "no") },
			"panic": func(s *Stream, _ []byte) error { panic("oh") },
			"work-panic": func(s *Stream, _ []byte) error {
				return s.Work(func() error { panic("oh") }, nil, func() {})
			},
			"wait": func(s *Stream, _ []byte) error {
				stop := make(chan struct{})
				return s.Work(func() error { <-stop; return Failed("cancelled", "x") }, nil, func() { close(stop) })
			},
			"flood": func(s *Stream, _ []byte) error {
				return s.Work(func() error {
					for {
						if err := s.Send(Stdout, make([]byte, 60000)); err != nil {
							return err
						}
					}
				}, nil, func() {})
			},
		}}
}

func TestStreamsFollowEachOtherOnOneConnection(t *testing.T) {
	agent, host := pair(t)
	srv := newTestServer()
	port := srv.AddPort("banger.0")
	go srv.ServeConnection(agent, port)
	w := NewWriter(host)
	for kind, answer := range map[string]byte{"ok": End, "fail": Error, "panic": Error, "work-panic": Error, "unknown": Error} {
		hello(t, w, nonceA)
		want(t, host, HelloOK)
		_ = w.Send(RequestPart, []byte(`{"kind":`))
		_ = w.Send(Request, []byte(`"`+kind+`"}`))
		want(t, host, answer)
		_ = w.Send(Stdin, []byte("late")) // in flight: ignored
		_ = w.Send(Bye, nil)
		want(t, host, ByeOK)
	}
	if state := srv.PortStates()[0]; state.State != "idle" || state.Name != "banger.0" {
		t.Errorf("state %+v", state)
	}
}

func TestByeBeforeEndCancels(t *testing.T) {
	agent, host := pair(t)
	go newTestServer().ServeConnection(agent, nil)
	w := NewWriter(host)
	hello(t, w, nonceA)
	want(t, host, HelloOK)
	_ = w.Send(Request, []byte(`{"kind":"wait"}`))
	_ = w.Send(Bye, nil)
	want(t, host, ByeOK)
}

func TestHelloInTheMiddleBeginsANewStream(t *testing.T) {
	agent, host := pair(t)
	go newTestServer().ServeConnection(agent, nil)
	w := NewWriter(host)
	hello(t, w, nonceA)
	want(t, host, HelloOK)
	_ = w.Send(Request, []byte(`{"kind":"wait"}`))
	hello(t, w, nonceB)
	payload := want(t, host, HelloOK)
	if !contains(payload, nonceB) {
		t.Errorf("HELLO_OK %q", payload)
	}
}

func contains(payload []byte, part string) bool {
	for i := 0; i+len(part) <= len(payload); i++ {
		if string(payload[i:i+len(part)]) == part {
			return true
		}
	}
	return false
}

func TestHangUpUnderAFloodOfOutputEndsTheStream(t *testing.T) {
	agent, host := pair(t)
	done := make(chan struct{})
	go func() { newTestServer().ServeConnection(agent, nil); close(done) }()
	w := NewWriter(host)
	hello(t, w, nonceA)
	want(t, host, HelloOK)
	_ = w.Send(Request, []byte(`{"kind":"flood"}`))
	want(t, host, Stdout)
	host.Close()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("the stream outlives its host")
	}
}

func TestNonsenseGetsAProtocolError(t *testing.T) {
	for name, bytes := range map[string][]byte{
		"too long": {0x04, 0xff, 0xff, 0xff, 0xff}, "bad type": {0xee, 0, 0, 0, 0}, "not a request": {0x10, 0, 0, 0, 0},
	} {
		agent, host := pair(t)
		go newTestServer().ServeConnection(agent, nil)
		hello(t, NewWriter(host), nonceA)
		want(t, host, HelloOK)
		_, _ = host.Write(bytes)
		if payload := want(t, host, Error); !contains(payload, "protocol") {
			t.Errorf("%s: %q", name, payload)
		}
	}
}

func TestRequestBeyondTheLimitIsRefused(t *testing.T) {
	agent, host := pair(t)
	go newTestServer().ServeConnection(agent, nil)
	w := NewWriter(host)
	hello(t, w, nonceA)
	want(t, host, HelloOK)
	go func() {
		for i := 0; i <= MaxRequest/MaxPayload; i++ {
			_ = w.Send(RequestPart, make([]byte, MaxPayload))
		}
	}()
	want(t, host, Error)
}

func TestAsFailureNamesErrnos(t *testing.T) {
	for code, err := range map[string]error{
		"not_found": syscall.ENOENT, "exists": syscall.EEXIST, "permission": syscall.EACCES,
		"no_space": syscall.ENOSPC, "not_a_directory": syscall.ELOOP, "io": errors.New("x"),
	} {
		if got := AsFailure(err).Code; got != code {
			t.Errorf("%v: %s, want %s", err, got, code)
		}
	}
}
