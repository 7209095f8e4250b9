package shell

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"banger/agent/boot"
	"banger/agent/exec"
	"banger/agent/system"
)

const (
	initWait  = 30 * time.Second
	onceLimit = time.Hour
	logLimit  = 1 << 20
)

var runningOnce int32

// RunOnce runs the script of this boot, to its end. It begins when the image's init has taken over.
func RunOnce(once *boot.Once) {
	atomic.StoreInt32(&runningOnce, 1)
	defer atomic.StoreInt32(&runningOnce, 0)
	log := openLog(once.Log)
	if log == nil {
		return
	}
	defer log.Close()
	for deadline := time.Now().Add(initWait); !system.OwnInit && system.HasOwnInit() && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
	}
	shell := Find("/", "/bin/sh", "/bin:/usr/bin")
	if shell == nil {
		fmt.Fprintln(log, "the image has no shell: nothing is done")
		return
	}
	pid1 := "image"
	if system.HasOwnInit() {
		pid1 = "agent"
	}
	environment := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C", "BANGER_PID1=" + pid1}
	argv := append(shell, "-c", string(once.Script))
	if err := exec.Run(argv, environment, log, onceLimit); err != nil {
		fmt.Fprintf(log, "%v\n", err)
		boot.Log("%s: %v", once.Log, err)
	}
}

// openLog opens the log to be added to, in /run where its own place cannot be written. Nothing is followed.
func openLog(name string) *os.File {
	for _, path := range []string{name, "/run/" + filepath.Base(name)} {
		_ = os.MkdirAll(filepath.Dir(path), 0o755)
		if info, err := os.Lstat(path); err == nil && (!info.Mode().IsRegular() || info.Size() > logLimit) {
			_ = os.Remove(path)
		}
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NOFOLLOW, 0o640)
		if err == nil {
			return file
		}
	}
	return nil
}
