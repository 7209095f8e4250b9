// Package system tells how the guest is, sets its clock and ends it.
package system

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	agentexec "banger/agent/exec"
	"banger/agent/stream"
)

// OwnDisk is a path on the VM's own disk; OwnInit says that PID 1 is the agent's.
var (
	OwnDisk = "/"
	OwnInit bool
	// DryRun keeps a test's shutdown from ending the host; DryRunEnd, if any, stands in for it.
	DryRun    bool
	DryRunEnd func()
	ending    int32
)

// Ending tells whether the machine has been asked to end: what ends from here on does so because of that.
func Ending() bool { return atomic.LoadInt32(&ending) != 0 }

// Uptime returns seconds since boot.
func Uptime() float64 {
	raw, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(raw))
	if len(fields) == 0 {
		return 0
	}
	value, _ := strconv.ParseFloat(fields[0], 64)
	return value
}

// BootID returns the kernel's id of this boot.
func BootID() string {
	raw, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw))
}

// Stats serves a stats request.
func Stats(s *stream.Stream, _ []byte) error {
	cpu := map[string]uint64{}
	cpus := 0
	if raw, err := os.ReadFile("/proc/stat"); err == nil {
		names := []string{"user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"}
		for _, line := range strings.Split(string(raw), "\n") {
			fields := strings.Fields(line)
			if len(fields) == 0 || !strings.HasPrefix(fields[0], "cpu") {
				continue
			}
			if fields[0] != "cpu" {
				cpus++
				continue
			}
			for i, name := range names {
				if i+1 < len(fields) {
					cpu[name], _ = strconv.ParseUint(fields[i+1], 10, 64)
				}
			}
		}
	}
	load := []float64{}
	if raw, err := os.ReadFile("/proc/loadavg"); err == nil {
		for _, field := range strings.Fields(string(raw))[:3] {
			value, _ := strconv.ParseFloat(field, 64)
			load = append(load, value)
		}
	}
	memory := map[string]uint64{}
	if raw, err := os.ReadFile("/proc/meminfo"); err == nil {
		wanted := map[string]string{"MemTotal:": "total", "MemAvailable:": "available", "MemFree:": "free", "Cached:": "cached"}
		for _, line := range strings.Split(string(raw), "\n") {
			fields := strings.Fields(line)
			if len(fields) >= 2 && wanted[fields[0]] != "" {
				kib, _ := strconv.ParseUint(fields[1], 10, 64)
				memory[wanted[fields[0]]] = kib << 10
			}
		}
	}
	disk := map[string]uint64{}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(OwnDisk, &fs); err == nil {
		block := uint64(fs.Bsize)
		disk["total"], disk["free"], disk["available"] = fs.Blocks*block, fs.Bfree*block, fs.Bavail*block
	}
	return s.Finish(map[string]interface{}{
		"cpu": cpu, "cpus": cpus, "load": load, "memory": memory, "disk": disk,
		"uptime": Uptime(), "processes": len(agentexec.Pids()),
	})
}

// Sync serves a sync request.
func Sync(s *stream.Stream, _ []byte) error {
	syscall.Sync()
	return s.Finish(nil)
}

// Time serves a time request.
func Time(s *stream.Stream, raw []byte) error {
	var request struct {
		UnixNs int64 `json:"unix_ns"`
	}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	if request.UnixNs <= 0 {
		return stream.Failed("bad_request", "unix_ns %d", request.UnixNs)
	}
	offset := request.UnixNs - time.Now().UnixNano()
	changed := false
	if (offset > 5e8 || offset < -5e8) && !DryRun {
		if err := SetClock(request.UnixNs); err != nil {
			return err
		}
		changed = true
	}
	return s.Finish(map[string]interface{}{"offset_ns": offset, "changed": changed})
}

// SetClock sets the wall clock.
func SetClock(unixNs int64) error {
	value := syscall.NsecToTimeval(unixNs)
	return syscall.Settimeofday(&value)
}

// Shutdown serves a shutdown request.
func Shutdown(s *stream.Stream, raw []byte) error {
	request := struct {
		Mode  string `json:"mode"`
		Force bool   `json:"force"`
	}{Mode: "reboot"}
	if err := stream.Decode(raw, &request); err != nil {
		return err
	}
	if request.Mode != "reboot" && request.Mode != "poweroff" {
		return stream.Failed("bad_request", "mode %q", request.Mode)
	}
	if err := s.Finish(nil); err != nil {
		return err
	}
	atomic.StoreInt32(&ending, 1)
	go func() {
		// The answer, and the BYE after it, go out first; neither is waited for.
		time.Sleep(20 * time.Millisecond)
		switch {
		case !DryRun:
			end(request.Mode == "reboot", request.Force)
		case DryRunEnd != nil:
			DryRunEnd()
		}
	}()
	return nil
}

func end(reboot, force bool) {
	if force {
		Reboot(reboot)
		return
	}
	switch initName() {
	case "agent":
		EndAll(reboot)
	case "systemd":
		number := syscall.Signal(34 + 4)
		if reboot {
			number = 34 + 5
		}
		askInit(number)
	case "busybox":
		number := syscall.SIGUSR2
		if reboot {
			number = syscall.SIGTERM
		}
		askInit(number)
	default:
		program := "poweroff"
		if reboot {
			program = "reboot"
		}
		for _, directory := range []string{"/sbin", "/usr/sbin", "/bin", "/usr/bin"} {
			path := directory + "/" + program
			if _, err := os.Stat(path); err == nil {
				runReboot(path)
				break
			}
		}
		EndAll(reboot)
	}
}

// runReboot runs the image's own program and gives it its time.
func runReboot(path string) {
	const patience = 30 * time.Second
	// Debian's sysv scripts wait five seconds for every process but those named here; the agent outlives SIGTERM.
	if os.MkdirAll("/run/sendsigs.omit.d", 0o755) == nil {
		_ = os.WriteFile("/run/sendsigs.omit.d/banger-agent", []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644)
	}
	comm, _ := os.ReadFile("/proc/1/comm")
	if strings.TrimSpace(string(comm)) != "runit" {
		if exec.Command(path).Run() == nil {
			time.Sleep(patience)
		}
		return
	}
	// Its first stage forgets what it is asked, so it is asked again; once it goes down it does not listen.
	for deadline := time.Now().Add(2 * patience); time.Now().Before(deadline); time.Sleep(2 * time.Second) {
		_ = exec.Command(path).Run()
	}
}

// askInit sends PID 1 a signal once it takes it: the kernel drops a signal for which a PID 1 that has just
// been exec'ed has no handler yet. The second one is for an init that was busy replacing itself.
func askInit(number syscall.Signal) {
	wait := 30 * time.Second
	if number == syscall.SIGTERM || number == syscall.SIGUSR2 {
		wait = 0 // busybox sits in sigtimedwait(2), which shows in no mask
	}
	for try := 0; try < 10; try++ {
		for deadline := time.Now().Add(wait); time.Now().Before(deadline) && !takes(number); {
			time.Sleep(20 * time.Millisecond)
		}
		_ = syscall.Kill(1, number)
		time.Sleep(3 * time.Second)
	}
}

// takes tells whether PID 1 catches a signal, or blocks it to read it from a signalfd as systemd does.
func takes(number syscall.Signal) bool {
	raw, err := os.ReadFile("/proc/1/status")
	if err != nil {
		return true
	}
	for _, line := range strings.Split(string(raw), "\n") {
		if strings.HasPrefix(line, "SigBlk:") || strings.HasPrefix(line, "SigCgt:") {
			mask, err := strconv.ParseUint(strings.TrimSpace(line[7:]), 16, 64)
			if err == nil && mask&(1<<(uint(number)-1)) != 0 {
				return true
			}
		}
	}
	return false
}

// initName guesses what PID 1 is.
func initName() string {
	if OwnInit || pidOneIsOurs() {
		return "agent"
	}
	path, _ := os.Readlink("/proc/1/exe")
	base := filepath.Base(path)
	switch {
	case strings.HasPrefix(base, "systemd"):
		return "systemd"
	case strings.HasPrefix(base, "busybox"):
		return "busybox"
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		return "systemd"
	}
	return base
}

// pidOneIsOurs tells whether PID 1 runs this very binary: an init that would not start, or has not yet.
func pidOneIsOurs() bool {
	one, err := os.Stat("/proc/1/exe")
	if err != nil {
		return false
	}
	self, err := os.Stat("/proc/self/exe")
	return err == nil && os.SameFile(one, self)
}

// HasOwnInit tells whether PID 1 is the agent's: nothing of the image is started by it.
func HasOwnInit() bool { return OwnInit || pidOneIsOurs() }

// EndAll ends every other process, politely first, then the machine.
func EndAll(reboot bool) {
	self := os.Getpid()
	others := func() int {
		n := 0
		for _, pid := range agentexec.Pids() {
			if pid == 1 || pid == self {
				continue
			}
			// Kernel threads have no command line and take no signals.
			if raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(raw) > 0 {
				n++
			}
		}
		return n
	}
	send := func(number syscall.Signal) {
		for _, pid := range agentexec.Pids() {
			if pid != 1 && pid != self {
				_ = syscall.Kill(pid, number)
			}
		}
	}
	send(syscall.SIGTERM)
	send(syscall.SIGCONT)
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline) && others() > 0; {
		time.Sleep(20 * time.Millisecond)
	}
	send(syscall.SIGKILL)
	Reboot(reboot)
}

// Reboot is sync and reboot(2).
func Reboot(reboot bool) {
	syscall.Sync()
	command := syscall.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		command = syscall.LINUX_REBOOT_CMD_RESTART
	}
	_ = syscall.Reboot(command)
}
