// Package sshagent lets programs of the guest reach the ssh-agent of the host's user: a socket in the guest, whose
// connections are channels of one stream. What is asked of the ssh-agent is the host's to judge.
package sshagent

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"banger/agent/exec"
	"banger/agent/stream"
	"banger/agent/system"
)

const (
	// More wait in the socket's backlog.
	maxChannels = 32
	// Four of the longest answers there are: who reads none of them is cut off.
	maxQueued   = 1 << 20
	idBytes     = 4
	readBytes   = 16 << 10
	acceptPause = 100 * time.Millisecond
)

// Handle serves an ssh_agent request.
func Handle(s *stream.Stream, raw []byte) error {
	var request struct {
		User string `json:"user"`
	}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	account, err := exec.LookUp(request.User, exec.Etc)
	if err != nil {
		return err
	}
	where, err := openPlace(parents(), account)
	if err != nil {
		return err
	}
	b := &bridge{
		s: s, place: where, stop: make(chan struct{}),
		slots: make(chan struct{}, maxChannels),
		open:  map[*channel]bool{}, numbered: map[uint32]*channel{},
	}
	return s.Work(b.run, b.frame, b.cancel)
}

func parents() []string {
	if system.DryRun {
		return []string{os.TempDir()}
	}
	return []string{"/run", "/tmp"}
}

// place is a directory of the user's own with a listening socket in it.
type place struct {
	directory string
	handle    *os.File
	listener  *net.UnixListener
}

const socketName = "agent"

func openPlace(parents []string, account *exec.Account) (*place, error) {
	var last error
	for _, parent := range parents {
		p, err := openPlaceBelow(parent, account)
		if err == nil {
			return p, nil
		}
		last = err
	}
	return nil, last
}

func openPlaceBelow(parent string, account *exec.Account) (p *place, err error) {
	directory, err := os.MkdirTemp(parent, "banger-ssh-")
	if err != nil {
		return nil, err
	}
	p = &place{directory: directory}
	defer func() {
		if err != nil {
			p.remove()
		}
	}()
	fd, err := syscall.Open(directory, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	p.handle = os.NewFile(uintptr(fd), directory)
	p.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: p.path(), Net: "unix"})
	if err != nil {
		return nil, err
	}
	p.listener.SetUnlinkOnClose(false)
	if err := os.Chmod(p.path(), 0o600); err != nil {
		return nil, err
	}
	// Only root can give away; anybody else's agent (in a test) runs programs as itself too.
	if os.Getuid() == 0 {
		// The directory last: until then it is root's, and nobody can put anything in the socket's place.
		if err := os.Lchown(p.path(), int(account.UID), int(account.GID)); err != nil {
			return nil, err
		}
		if err := p.handle.Chown(int(account.UID), int(account.GID)); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *place) path() string { return filepath.Join(p.directory, socketName) }

// remove takes socket and directory away. The user may have put a symlink in the directory's place meanwhile:
// the socket is removed through the descriptor, and rmdir follows no link.
func (p *place) remove() {
	if p.listener != nil {
		p.listener.Close()
	}
	if p.handle != nil {
		_ = syscall.Unlinkat(int(p.handle.Fd()), socketName)
		p.handle.Close()
	}
	_ = syscall.Rmdir(p.directory)
}

// bridge joins the socket's connections to the stream.
type bridge struct {
	s     *stream.Stream
	place *place
	stop  chan struct{}
	slots chan struct{}
	group sync.WaitGroup

	mutex    sync.Mutex
	stopped  bool
	open     map[*channel]bool
	numbered map[uint32]*channel

	// Held from the choice of a number until the host is told of it, so that numbers grow there too.
	numbering sync.Mutex
	last      uint32
}

// run is the worker: it takes connections until the stream is over.
func (b *bridge) run() error {
	defer b.place.remove()
	defer b.group.Wait()
	if err := b.s.SendJSON(stream.Started, map[string]string{"path": b.place.path()}); err != nil {
		b.cancel()
		return err
	}
	for {
		select {
		case b.slots <- struct{}{}:
		case <-b.stop:
			return nil
		}
		connection, err := b.place.listener.AcceptUnix()
		if err == nil {
			b.serve(connection)
			continue
		}
		<-b.slots
		// Out of descriptors, say; it is no reason to end what goes on.
		select {
		case <-b.stop:
			return nil
		case <-time.After(acceptPause):
		}
	}
}

func (b *bridge) serve(connection *net.UnixConn) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.stopped {
		connection.Close()
		<-b.slots
		return
	}
	c := &channel{connection: connection, filled: make(chan struct{}, 1)}
	b.open[c] = true
	b.group.Add(2)
	go func() {
		defer b.group.Done()
		c.write()
	}()
	go func() {
		defer b.group.Done()
		b.read(c)
	}()
}

// read carries what a program asks, and ends its channel.
func (b *bridge) read(c *channel) {
	buffer := make([]byte, stream.HeaderBytes+idBytes+readBytes)
	body := stream.HeaderBytes + idBytes
	var id uint32
	for {
		n, err := c.connection.Read(buffer[body:])
		if n > 0 && id == 0 {
			var sendErr error
			if id, sendErr = b.begin(c, buffer[:body+n]); sendErr != nil {
				break
			}
		} else if n > 0 && b.s.SendPrepared(stream.Data, buffer[:body+n]) != nil {
			break
		}
		if err != nil {
			break
		}
	}
	b.mutex.Lock()
	delete(b.open, c)
	delete(b.numbered, id)
	b.mutex.Unlock()
	c.cut()
	if id != 0 {
		// Before the slot is free: the host, which counts too, hears of this end before the next beginning.
		_ = b.s.SendPrepared(stream.Data, buffer[:body])
	}
	<-b.slots
}

// begin gives a channel its number, not 0, and sends its first bytes.
func (b *bridge) begin(c *channel, frame []byte) (uint32, error) {
	b.numbering.Lock()
	defer b.numbering.Unlock()
	b.last++
	id := b.last
	b.mutex.Lock()
	b.numbered[id] = c
	b.mutex.Unlock()
	binary.BigEndian.PutUint32(frame[stream.HeaderBytes:], id)
	return id, b.s.SendPrepared(stream.Data, frame)
}

// frame takes what the host sent. It never waits: a program that does not read harms its own channel only.
func (b *bridge) frame(f stream.Frame) error {
	if f.Type != stream.Data {
		return nil
	}
	if len(f.Payload) < idBytes {
		return fmt.Errorf("%w: DATA of %d bytes without a channel", stream.ErrProtocol, len(f.Payload))
	}
	b.mutex.Lock()
	c := b.numbered[binary.BigEndian.Uint32(f.Payload)]
	b.mutex.Unlock()
	switch {
	case c == nil: // closed meanwhile
	case len(f.Payload) == idBytes:
		c.end()
	default:
		c.push(f.Payload[idBytes:])
	}
	return nil
}

// cancel ends it all; idempotent.
func (b *bridge) cancel() {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.stopped {
		return
	}
	b.stopped = true
	close(b.stop)
	b.place.listener.Close()
	for c := range b.open {
		c.connection.Close()
	}
}

// channel is one connection of a program.
type channel struct {
	connection *net.UnixConn
	filled     chan struct{}

	mutex  sync.Mutex
	queue  [][]byte
	size   int
	ended  bool
	closed bool
}

func (c *channel) poke() {
	select {
	case c.filled <- struct{}{}:
	default:
	}
}

func (c *channel) push(data []byte) {
	c.mutex.Lock()
	full := c.size+len(data) > maxQueued
	if !full && !c.closed && !c.ended {
		c.queue = append(c.queue, append([]byte(nil), data...))
		c.size += len(data)
	}
	c.mutex.Unlock()
	if full {
		c.cut()
		return
	}
	c.poke()
}

// end closes the connection once what came for it is written.
func (c *channel) end() {
	c.mutex.Lock()
	c.ended = true
	c.mutex.Unlock()
	c.poke()
}

// cut closes the connection at once; idempotent.
func (c *channel) cut() {
	c.mutex.Lock()
	c.closed, c.queue = true, nil
	c.mutex.Unlock()
	c.connection.Close()
	c.poke()
}

// write carries the host's answers to the program.
func (c *channel) write() {
	defer c.cut()
	for {
		c.mutex.Lock()
		var chunk []byte
		if len(c.queue) > 0 {
			chunk, c.queue = c.queue[0], c.queue[1:]
		}
		ended, closed := c.ended, c.closed
		c.mutex.Unlock()
		switch {
		case closed, ended && chunk == nil:
			return
		case chunk == nil:
			<-c.filled
			continue
		}
		if _, err := c.connection.Write(chunk); err != nil {
			return
		}
		c.mutex.Lock()
		c.size -= len(chunk)
		c.mutex.Unlock()
	}
}
