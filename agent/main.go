// banger-agent is /init of banger's initramfs, the agent that lives on beside the image's own init, and PID 1
// for images that have none. See PROTOCOL.md.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"

	"banger/agent/boot"
	"banger/agent/exec"
	"banger/agent/files"
	"banger/agent/forward"
	"banger/agent/keeplog"
	"banger/agent/session"
	"banger/agent/shell"
	"banger/agent/sshagent"
	"banger/agent/stream"
	"banger/agent/system"
)

// version is set by the build: -ldflags "-X main.version=...".
var version = "dev"

func main() {
	switch {
	case os.Getpid() == 1 && filepath.Base(os.Args[0]) == "init":
		boot.Main()
	case os.Args[0] == boot.AgentArgument:
		serveGuest(os.Args[1:])
	case len(os.Args) == 2 && os.Args[1] == "version":
		fmt.Println(version)
	case (len(os.Args) == 3 || len(os.Args) == 4) && os.Args[1] == "serve-unix":
		ports := 4
		if len(os.Args) == 4 {
			ports, _ = strconv.Atoi(os.Args[3])
		}
		system.DryRun = true
		if os.Getenv("BANGER_AGENT_EXIT_ON_SHUTDOWN") != "" {
			system.DryRunEnd = func() { os.Exit(0) }
		}
		if directory := os.Getenv("BANGER_AGENT_LOGS"); directory != "" {
			exec.LogDirectory = directory
		}
		session.NoCgroups = true
		session.Directory = filepath.Join(os.Args[2], "sessions")
		session.Load()
		if err := serveUnix(newServer("test"), os.Args[2], ports); err != nil {
			fmt.Fprintln(os.Stderr, "banger-agent:", err)
			os.Exit(1)
		}
	case len(os.Args) == 5 && os.Args[1] == "keep-log":
		limit, _ := strconv.ParseInt(os.Args[3], 10, 64)
		kept, _ := strconv.ParseInt(os.Args[4], 10, 64)
		debug.SetGCPercent(20)
		if err := keeplog.Run(os.Args[2], limit, kept, os.Stdin); err != nil {
			fmt.Fprintln(os.Stderr, "banger-agent: keep-log:", err)
			os.Exit(1)
		}
	default:
		fmt.Fprintln(os.Stderr, "usage: banger-agent version | serve-unix DIRECTORY [PORTS] | keep-log FILE LIMIT KEPT")
		os.Exit(2)
	}
}

func newServer(mode string) *stream.Server {
	server := &stream.Server{
		AgentVersion: version, BootID: system.BootID(), Mode: mode, Uptime: system.Uptime,
		Log: func(format string, arguments ...interface{}) {
			if mode == "test" {
				fmt.Fprintf(os.Stderr, format+"\n", arguments...)
			} else {
				boot.Log(format, arguments...)
			}
		},
	}
	server.Handlers = map[string]stream.Handler{
		"exec": exec.Handle, "put": files.Put, "get": files.Get, "stat": files.Stat,
		"forward": forward.Handle, "ports": forward.Ports,
		"stats": system.Stats, "sync": system.Sync, "time": system.Time, "shutdown": system.Shutdown,
		"shell": shell.Handle, "session": session.Handle, "ssh_agent": sshagent.Handle,
		"streams": func(s *stream.Stream, _ []byte) error {
			return s.Finish(map[string]interface{}{"streams": server.PortStates()})
		},
	}
	return server
}

// serveGuest is the long-lived agent.
func serveGuest(arguments []string) {
	mode := "beside"
	if len(arguments) > 0 {
		mode = arguments[0]
	}
	// Caught and dropped, not ignored: an ignored signal would stay so in every child.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPWR)
	exec.OOMAdjust = true
	exec.SetOOMScore(exec.AgentOOMScore)
	// The agent's live heap is small; a larger one would be the guest's loss.
	debug.SetGCPercent(50)
	if runtime.NumCPU() > 4 {
		runtime.GOMAXPROCS(4)
	}
	system.OwnInit = mode == "init"
	duties, dutiesErr := boot.ReadDuties()
	exec.ImageEnvironment = duties.Environment
	session.Load()
	server := newServer(mode)
	opener := &portOpener{server: server, open: map[string]bool{}}
	opener.scan()
	vsockErr := listenVsock(server)
	boot.TellReady()
	go opener.watch()
	if vsockErr != nil && opener.scan() == 0 {
		boot.Log("no port yet and no vsock: %v", vsockErr)
	}
	if dutiesErr != nil {
		boot.Log("the agent's duties do not read: %v", dutiesErr)
	}
	if duties.Network != nil {
		if err := boot.ConfigureLateNetwork(duties.Network); err != nil {
			boot.Log("network: %v", err)
		}
	}
	if duties.Once != nil {
		shell.RunOnce(duties.Once)
	}
	select {}
}

func dup(file *os.File) (int, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return -1, err
	}
	result := -1
	var dupErr error
	if err := raw.Control(func(fd uintptr) {
		n, _, errno := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_DUPFD_CLOEXEC, 0)
		if errno != 0 {
			dupErr = errno
			return
		}
		result = int(n)
	}); err != nil {
		return -1, err
	}
	return result, dupErr
}
