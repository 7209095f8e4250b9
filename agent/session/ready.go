package session

import (
	"net"
	"os"
	"strconv"
	"time"

	"banger/agent/exec"
)

const (
	readyPause   = 200 * time.Millisecond
	readyTimeout = 10 * time.Second // of one try
)

// readiness is the check that was asked for: one of the three.
type readiness struct {
	port    int
	file    string
	command []string
}

func (x *session) becomeReady(check *readiness) {
	for {
		x.mutex.Lock()
		over, runs := x.body.State == ended, x.child != nil
		x.mutex.Unlock()
		if over {
			return
		}
		if runs && check.try(x.request) {
			x.mutex.Lock()
			yes := true
			x.body.Ready = &yes
			x.notify()
			x.mutex.Unlock()
			x.save()
			return
		}
		select {
		case <-x.done:
			return
		case <-time.After(readyPause):
		}
	}
}

func (check *readiness) try(as *exec.Request) bool {
	switch {
	case check.file != "":
		_, err := os.Stat(check.file)
		return err == nil
	case check.port != 0:
		for _, host := range []string{"127.0.0.1", "::1"} {
			connection, err := net.DialTimeout("tcp", net.JoinHostPort(host, strconv.Itoa(check.port)), time.Second)
			if err == nil {
				connection.Close()
				return true
			}
		}
		return false
	}
	request := *as
	request.Argv, request.TTY, request.Stdin, request.Within = check.command, nil, false, nil
	child, err := exec.Start(&request)
	if err != nil {
		return false
	}
	child.Close() // nobody wants to know what it says
	timer := time.AfterFunc(readyTimeout, func() { exec.KillSession(child.Process.Pid) })
	defer timer.Stop()
	state, err := child.Process.Wait()
	return err == nil && state.Success()
}
