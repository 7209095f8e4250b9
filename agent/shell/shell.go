// Package shell knows what a user who comes in finds: which shell, whether sshd serves or will, and the script that
// sets sshd up.
package shell

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"banger/agent/exec"
	"banger/agent/forward"
	"banger/agent/stream"
	"banger/agent/system"
)

const sshPort = 22

// Answer is the END of a shell request.
type Answer struct {
	Argv []string `json:"argv"` // base64; null where the image has no shell
	Sshd string   `json:"sshd"` // up, coming, none
}

// Handle serves a shell request.
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
	answer := Answer{Sshd: sshd("/")}
	for _, word := range Find("/", account.Shell, exec.SearchPath(account)) {
		answer.Argv = append(answer.Argv, base64.StdEncoding.EncodeToString([]byte(word)))
	}
	return s.Finish(answer)
}

// noShells are what /etc/passwd names to keep people out.
var noShells = map[string]bool{"nologin": true, "false": true, "true": true, "sync": true, "halt": true, "shutdown": true}

// Find returns the best shell below root: the account's own, else bash, else another Bourne shell, else
// busybox's; nil where there is none.
func Find(root, own, path string) []string {
	if strings.HasPrefix(own, "/") && !noShells[filepath.Base(own)] && isProgram(root, own) {
		return []string{own}
	}
	// Where the usual ones are, whatever the image's PATH says; /busybox is distroless' debug variant.
	directories := append(strings.Split(path, ":"), "/bin", "/usr/bin", "/usr/local/bin", "/busybox")
	for _, name := range []string{"bash", "sh", "ash", "dash", "zsh", "busybox"} {
		for _, directory := range directories {
			program := directory + "/" + name
			if !strings.HasPrefix(directory, "/") || !isProgram(root, program) {
				continue
			}
			if name == "busybox" {
				return []string{program, "sh"}
			}
			return []string{program}
		}
	}
	return nil
}

func isProgram(root, path string) bool {
	info, err := os.Stat(filepath.Join(root, path))
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// sshd tells whether somebody listens on port 22, or will because the image's init starts it.
func sshd(root string) string {
	for _, proto := range []string{"tcp", "tcp6"} {
		raw, err := os.ReadFile("/proc/net/" + proto)
		if err != nil {
			continue
		}
		for _, entry := range forward.ParseTable(proto, string(raw)) {
			if entry.Port == sshPort {
				return "up"
			}
		}
	}
	if system.HasOwnInit() || atomic.LoadInt32(&runningOnce) != 0 || !Enabled(root) {
		return "none"
	}
	return "coming"
}

// Enabled tells whether an sshd is there and one of the inits is set to start it.
func Enabled(root string) bool {
	there := false
	for _, program := range []string{"/usr/sbin/sshd", "/usr/bin/sshd", "/sbin/sshd", "/usr/local/sbin/sshd", "/usr/sbin/dropbear"} {
		there = there || isProgram(root, program)
	}
	if !there {
		return false
	}
	for _, started := range []string{
		"etc/systemd/system/*.wants/ssh*.s*", "etc/systemd/system/*.wants/dropbear*.s*",
		"usr/lib/systemd/system/*.wants/ssh*.s*",
		"etc/rc[2-5].d/S*ssh*", "etc/rc[2-5].d/S*dropbear*",
		"etc/runlevels/*/ssh*", "etc/runlevels/*/dropbear*",
		"etc/runit/runsvdir/*/ssh*", "etc/service/ssh*", "var/service/ssh*", "etc/s6*/*/ssh*",
	} {
		if found, _ := filepath.Glob(filepath.Join(root, started)); len(found) > 0 {
			return true
		}
	}
	return false
}
