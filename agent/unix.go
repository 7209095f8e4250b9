package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"banger/agent/stream"
)

// serveUnix is the test mode: DIR/pNN emulate QEMU's port sockets (one client at a time, hang-ups seen as
// EOF), DIR/listen takes connections as vsock does.
func serveUnix(server *stream.Server, directory string, ports int) error {
	for i := 0; i < ports; i++ {
		listener, err := net.Listen("unix", fmt.Sprintf("%s/p%02d", directory, i))
		if err != nil {
			return err
		}
		link := &acceptingLink{listener: listener.(*net.UnixListener)}
		port := server.AddPort(portPrefix + strconv.Itoa(i))
		go func() {
			err := server.ServePort(link, port)
			fmt.Fprintln(os.Stderr, "port ended:", err)
		}()
	}
	listener, err := net.Listen("unix", directory+"/listen")
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		link, err := linkOf(connection.(*net.UnixConn))
		if err != nil {
			continue
		}
		go server.ServeConnection(link, nil)
	}
}

func linkOf(connection *net.UnixConn) (stream.Link, error) {
	file, err := connection.File() // a duplicate
	connection.Close()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	fd, err := dup(file)
	if err != nil {
		return nil, err
	}
	return stream.NewLink(fd, "unix", false)
}

// acceptingLink gives a listening socket the manners of a virtio-serial port.
type acceptingLink struct {
	listener *net.UnixListener
	mutex    sync.Mutex
	current  stream.Link
	readBy   time.Time
	writeBy  time.Time
}

func (l *acceptingLink) get() stream.Link {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.current
}

func (l *acceptingLink) Read(p []byte) (int, error) {
	current := l.get()
	if current == nil {
		connection, err := l.listener.AcceptUnix()
		if err != nil {
			return 0, err
		}
		if current, err = linkOf(connection); err != nil {
			return 0, err
		}
		l.mutex.Lock()
		l.current = current
		_ = current.SetWriteDeadline(l.writeBy)
		l.mutex.Unlock()
	}
	n, err := current.Read(p)
	if err != nil {
		l.mutex.Lock()
		l.current = nil
		l.mutex.Unlock()
		current.Close()
		return 0, io.EOF
	}
	return n, nil
}

func (l *acceptingLink) Write(p []byte) (int, error) {
	if current := l.get(); current != nil {
		return current.Write(p)
	}
	return 0, stream.ErrHungUp
}

func (l *acceptingLink) HungUp() bool {
	current := l.get()
	return current == nil || current.HungUp()
}

func (l *acceptingLink) IsPort() bool { return true }

func (l *acceptingLink) SetReadDeadline(t time.Time) error { return nil }

func (l *acceptingLink) SetWriteDeadline(t time.Time) error {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	l.writeBy = t
	if l.current != nil {
		return l.current.SetWriteDeadline(t)
	}
	return nil
}

func (l *acceptingLink) Close() error { return l.listener.Close() }
