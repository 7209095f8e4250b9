package main

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"banger/agent/boot"
	"banger/agent/stream"
)

const (
	portPrefix = "banger."
	vsockPort  = 1024
	afVsock    = 40
	anyCID     = 0xffffffff
	hostCID    = 2
)

// portOpener finds virtio-serial ports and serves each once.
type portOpener struct {
	server *stream.Server
	mutex  sync.Mutex
	open   map[string]bool
}

// scan opens the ports that are there and not yet open, and returns how many are.
func (o *portOpener) scan() int {
	files, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, file := range files {
		raw, err := os.ReadFile(file)
		name := strings.TrimSpace(string(raw))
		if err != nil || !strings.HasPrefix(name, portPrefix) {
			continue
		}
		o.mutex.Lock()
		known := o.open[name]
		o.mutex.Unlock()
		if known {
			continue
		}
		device := "/dev/" + filepath.Base(filepath.Dir(file))
		fd, err := syscall.Open(device, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
		if err != nil {
			continue // devtmpfs makes the node a little after sysfs has the name
		}
		link, err := stream.NewLink(fd, device, true)
		if err != nil {
			boot.Log("%s: %v", device, err)
			continue
		}
		o.mutex.Lock()
		o.open[name] = true
		o.mutex.Unlock()
		port := o.server.AddPort(name)
		go func() {
			err := o.server.ServePort(link, port)
			link.Close()
			boot.Log("port %s: %v", name, err)
			time.Sleep(time.Second)
			o.mutex.Lock()
			delete(o.open, name)
			o.mutex.Unlock()
			o.scan()
		}()
	}
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return len(o.open)
}

// watch scans again for ports that appear late: often until some are there and no new one has come for half a
// second, then every two seconds for ten. Each scan reads a file per port.
func (o *portOpener) watch() {
	last, quiet := o.scan(), 0
	for i := 0; i < 1000 && (last == 0 || quiet < 10); i++ {
		time.Sleep(50 * time.Millisecond)
		quiet++
		if n := o.scan(); n != last {
			last, quiet = n, 0
		}
	}
	for i := 0; i < 5; i++ {
		time.Sleep(2 * time.Second)
		o.scan()
	}
}

type sockaddrVM struct {
	family   uint16
	reserved uint16
	port     uint32
	cid      uint32
	flags    uint8
	zero     [3]uint8
}

// listenVsock serves AF_VSOCK, if the kernel has it.
func listenVsock(server *stream.Server) error {
	fd, err := syscall.Socket(afVsock, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	address := sockaddrVM{family: afVsock, port: vsockPort, cid: anyCID}
	if _, _, errno := syscall.Syscall(syscall.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&address)), unsafe.Sizeof(address)); errno != 0 {
		syscall.Close(fd)
		return errno
	}
	if err := syscall.Listen(fd, 128); err != nil {
		syscall.Close(fd)
		return err
	}
	listener := os.NewFile(uintptr(fd), "vsock")
	raw, err := listener.SyscallConn()
	if err != nil {
		return err
	}
	go func() {
		for {
			accepted := -1
			var peer sockaddrVM
			err := raw.Read(func(fd uintptr) bool {
				size := uint32(unsafe.Sizeof(peer))
				n, _, errno := syscall.Syscall6(syscall.SYS_ACCEPT4, fd, uintptr(unsafe.Pointer(&peer)),
					uintptr(unsafe.Pointer(&size)), syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0, 0)
				if errno == syscall.EAGAIN {
					return false
				}
				if errno == 0 {
					accepted = int(n)
				}
				return true
			})
			if err != nil {
				return
			}
			if accepted < 0 {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			if peer.cid != hostCID {
				syscall.Close(accepted)
				continue
			}
			if link, err := stream.NewLink(accepted, "vsock", false); err == nil {
				go server.ServeConnection(link, nil)
			}
		}
	}()
	return nil
}
