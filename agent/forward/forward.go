// Package forward carries TCP connections into the guest and lists its listening sockets.
package forward

import (
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"banger/agent/stream"
)

const (
	dialTimeout = 10 * time.Second
	maxWait     = 10 * time.Minute
)

// Handle serves a forward request.
func Handle(s *stream.Stream, raw []byte) error {
	request := struct {
		Host   string `json:"host"`
		Port   int    `json:"port"`
		WaitMs int64  `json:"wait_ms"`
	}{Host: "127.0.0.1"}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	if request.Port < 1 || request.Port > 65535 || request.WaitMs < 0 || len(request.Host) > 255 {
		return stream.Failed("bad_request", "port %d, wait_ms %d", request.Port, request.WaitMs)
	}
	wait := time.Duration(request.WaitMs) * time.Millisecond
	if wait > maxWait || wait < 0 {
		wait = maxWait
	}
	c := &carrier{s: s, stop: make(chan struct{}), up: newQueue()}
	return s.Work(func() error {
		connection, err := dial(request.Host, request.Port, wait, c.stop)
		if err != nil {
			return err
		}
		return c.carry(connection)
	}, c.frame, c.cancel)
}

func dial(host string, port int, wait time.Duration, stop chan struct{}) (*net.TCPConn, error) {
	hosts := []string{host}
	if host == "localhost" || host == "" {
		hosts = []string{"127.0.0.1", "::1"}
	}
	deadline := time.Now().Add(wait)
	pause := 20 * time.Millisecond
	for {
		var last error
		for i := len(hosts) - 1; i >= 0; i-- {
			timeout := time.Until(deadline)
			if timeout > dialTimeout {
				timeout = dialTimeout
			} else if timeout < time.Second {
				timeout = time.Second
			}
			connection, err := net.DialTimeout("tcp", net.JoinHostPort(hosts[i], strconv.Itoa(port)), timeout)
			if err == nil {
				return connection.(*net.TCPConn), nil
			}
			last = err
		}
		if time.Now().Add(pause).After(deadline) {
			if errors.Is(last, syscall.ECONNREFUSED) {
				return nil, stream.Failed("refused", "nothing listens on port %d in the guest", port)
			}
			var timeout net.Error
			if errors.As(last, &timeout) && timeout.Timeout() {
				return nil, stream.Failed("timed_out", "connect to %s port %d: %v", host, port, last)
			}
			return nil, stream.Failed("refused", "connect to %s port %d: %v", host, port, last)
		}
		select {
		case <-stop:
			return nil, stream.Failed("cancelled", "cancelled")
		case <-time.After(pause):
		}
		if pause < 100*time.Millisecond {
			pause += 20 * time.Millisecond
		}
	}
}

type carrier struct {
	s    *stream.Stream
	stop chan struct{}
	up   *queue
}

// carry moves bytes until both directions are closed.
func (c *carrier) carry(connection *net.TCPConn) error {
	defer connection.Close()
	if err := c.s.SendJSON(stream.ForwardOK, struct{}{}); err != nil {
		return err
	}
	finished := make(chan struct{})
	defer close(finished)
	go func() { // a hang-up unblocks both copies
		select {
		case <-c.stop:
			connection.Close()
		case <-finished:
		}
	}()
	upError := make(chan error, 1)
	go func() {
		err := c.up.copyTo(connection)
		if err == nil {
			err = connection.CloseWrite()
			if errors.Is(err, syscall.ENOTCONN) {
				err = nil
			}
		} else {
			c.up.drop()
			if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
				err = nil // the reading side says how it ended
			}
		}
		upError <- err
	}()
	buffer := make([]byte, stream.HeaderBytes+stream.MaxPayload)
	for {
		n, err := connection.Read(buffer[stream.HeaderBytes:])
		if n > 0 {
			if sendErr := c.s.SendPrepared(stream.Data, buffer[:stream.HeaderBytes+n]); sendErr != nil {
				return sendErr
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			c.up.drop()
			return stream.Failed("io", "the connection broke: %v", err)
		}
	}
	if err := c.s.Send(stream.DataEOF, nil); err != nil {
		return err
	}
	select {
	case err := <-upError:
		if err != nil {
			return stream.Failed("io", "the connection broke: %v", err)
		}
	case <-c.stop:
		return stream.Failed("cancelled", "cancelled")
	}
	return c.s.Finish(nil)
}

func (c *carrier) frame(f stream.Frame) error {
	switch f.Type {
	case stream.Data:
		// Waits while the peer does not read: that is the back-pressure. A hang-up must still be seen.
		for !c.up.push(f.Payload, time.Second) {
			if c.s.Link.HungUp() {
				return stream.ErrHungUp
			}
		}
	case stream.DataEOF:
		c.up.end()
	}
	return nil
}

func (c *carrier) cancel() {
	close(c.stop)
	c.up.drop()
}

// queue is one direction's bytes between the frame reader and the TCP writer.
type queue struct {
	mutex   sync.Mutex
	chunks  [][]byte
	size    int
	ended   bool
	dropped bool
	filled  chan struct{}
	emptied chan struct{}
}

const queueLimit = 512 << 10

func newQueue() *queue {
	return &queue{filled: make(chan struct{}, 1), emptied: make(chan struct{}, 1)}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// push takes a copy of data; false when there was no room for that long.
func (q *queue) push(data []byte, wait time.Duration) bool {
	deadline := time.NewTimer(wait)
	defer deadline.Stop()
	for {
		q.mutex.Lock()
		if q.dropped || q.ended {
			q.mutex.Unlock()
			return true
		}
		if q.size < queueLimit {
			q.chunks = append(q.chunks, append([]byte(nil), data...))
			q.size += len(data)
			q.mutex.Unlock()
			poke(q.filled)
			return true
		}
		q.mutex.Unlock()
		select {
		case <-q.emptied:
		case <-deadline.C:
			return false
		}
	}
}

func (q *queue) end() {
	q.mutex.Lock()
	q.ended = true
	q.mutex.Unlock()
	poke(q.filled)
}

func (q *queue) drop() {
	q.mutex.Lock()
	q.dropped, q.chunks = true, nil
	q.mutex.Unlock()
	poke(q.filled)
	poke(q.emptied)
}

func (q *queue) copyTo(sink io.Writer) error {
	for {
		q.mutex.Lock()
		chunks, ended, dropped := q.chunks, q.ended, q.dropped
		q.chunks, q.size = nil, 0
		q.mutex.Unlock()
		poke(q.emptied)
		for _, chunk := range chunks {
			if _, err := sink.Write(chunk); err != nil {
				return err
			}
		}
		if dropped || ended && len(chunks) == 0 {
			return nil
		}
		if len(chunks) == 0 {
			<-q.filled
		}
	}
}
