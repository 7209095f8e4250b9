package stream

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"banger/agent/sys"
)

// ErrHungUp says that the host went away while the agent was writing.
var ErrHungUp = errors.New("the host hung up")

// Link is a connection or a port.
//
// Read of a port returns io.EOF once for each hang-up and then waits for the next host.
type Link interface {
	io.Reader
	io.Writer
	HungUp() bool
	IsPort() bool
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	Close() error
}

type fdLink struct {
	file *os.File
	raw  syscall.RawConn
	port bool
	// 1 when the last read was EOF. A port starts with no host: EOF is news only after bytes.
	eofTold int32
}

// The kernel learns of a host's coming and going through the control queue, which a work queue serves, and of
// its bytes through another queue: a HELLO may be read before the connect, even before the disconnect of the host
// before it. So neither a write that finds no host nor EOF is believed at once. (Seen under TCG, about one
// stream in a hundred.)
const (
	connectGrace = time.Second
	hangUpGrace  = 30 * time.Millisecond
	gracePause   = 500 * time.Microsecond
)

// stillHungUp waits for the host to be back and tells whether it stayed away.
func (l *fdLink) stillHungUp(fd int, grace time.Duration, stop func() bool) bool {
	for deadline := time.Now().Add(grace); sys.HungUp(fd); time.Sleep(gracePause) {
		if stop() || time.Now().After(deadline) {
			return true
		}
	}
	return false
}

// NewLink makes a link of a non-blocking descriptor and owns it from then on.
//
// It uses Go's edge-triggered poller: virtio_console wakes its wait queue when the host connects,
// sends or hangs up, so an idle port costs nothing though it is readable (EOF) all the time.
func NewLink(fd int, name string, port bool) (Link, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &fdLink{file: file, raw: raw, port: port, eofTold: 1}, nil
}

func (l *fdLink) Read(p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	waitErr := l.raw.Read(func(fd uintptr) bool {
		for {
			n, err = syscall.Read(int(fd), p)
			switch {
			case err == syscall.EINTR:
				continue
			case err == syscall.EAGAIN:
				return false
			case err != nil:
				n = 0
				return true
			case n > 0:
				atomic.StoreInt32(&l.eofTold, 0)
				return true
			case l.port && atomic.LoadInt32(&l.eofTold) == 1:
				return false
			case l.port && !l.stillHungUp(int(fd), hangUpGrace, func() bool { return false }):
				continue
			default:
				atomic.StoreInt32(&l.eofTold, 1)
				err = io.EOF
				return true
			}
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return n, err
}

func (l *fdLink) Write(p []byte) (written int, err error) {
	waitErr := l.raw.Write(func(fd uintptr) bool {
		for written < len(p) {
			var n int
			n, err = syscall.Write(int(fd), p[written:])
			switch {
			case err == syscall.EINTR:
				continue
			case err == syscall.EAGAIN:
				// A port without a host is never writable: do not wait for that.
				if !sys.HungUp(int(fd)) {
					return false
				}
				if l.stillHungUp(int(fd), connectGrace, func() bool { return atomic.LoadInt32(&l.eofTold) == 1 }) {
					err = ErrHungUp
					return true
				}
				continue
			case err != nil:
				return true
			}
			written += n
		}
		return true
	})
	if waitErr != nil {
		return written, waitErr
	}
	return written, err
}

func (l *fdLink) HungUp() bool {
	gone := true
	_ = l.raw.Control(func(fd uintptr) { gone = sys.HungUp(int(fd)) })
	return gone
}

func (l *fdLink) IsPort() bool { return l.port }

func (l *fdLink) SetReadDeadline(t time.Time) error  { return l.file.SetReadDeadline(t) }
func (l *fdLink) SetWriteDeadline(t time.Time) error { return l.file.SetWriteDeadline(t) }
func (l *fdLink) Close() error                       { return l.file.Close() }
