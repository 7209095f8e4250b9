package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestNeutralizeRemovesWhatIsOneMachinesOwnAndNothingElse(t *testing.T) {
	base := t.TempDir()
	image := filepath.Join(base, "image")
	write := func(name, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	write(image+"/etc/ssh/ssh_host_ed25519_key", "secret")
	write(image+"/etc/ssh/sshd_config", "mine")
	write(image+"/etc/hosts", "127.0.0.1 localhost\n\n127.0.1.1 box\n10.0.0.1 mine")
	write(image+"/var/sessions/one/stdout.0", "what was said")
	write(base+"/victim/ssh_host_x", "the host's")
	_ = os.Symlink(base+"/victim", image+"/var/sessions/link")
	write(base+"/victim/hosts", "127.0.1.1 box\n")
	_ = os.Symlink(base+"/victim/ssh_host_x", image+"/etc/ssh/ssh_host_link")
	_ = os.Symlink(base+"/victim", image+"/out")
	r, err := openRoot(image)
	if err != nil {
		t.Fatal(err)
	}
	config, err := ParseConfig([]byte(`{"files":[],"export":{"empty":["/var/sessions","/none"],"remove":["/etc/ssh/ssh_host_*","/out/ssh_host_*","/no/where"],
		"drop_lines":[{"path":"/etc/hosts","content_b64":"MTI3LjAuMS4xIGJveAo="},{"path":"/out/hosts","content_b64":"MTI3LjAuMS4xIGJveAo="}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	config.Files = []File{{Path: "/etc/machine-id", Mode: 0o444, UID: os.Getuid(), GID: os.Getgid()}}
	if err := neutralize(r, config); err != nil {
		t.Fatal(err)
	}
	for name, wanted := range map[string]string{
		image + "/etc/ssh/sshd_config":   "mine",
		image + "/etc/hosts":             "127.0.0.1 localhost\n\n10.0.0.1 mine",
		image + "/etc/machine-id":        "",
		base + "/victim/ssh_host_x":      "the host's",
		base + "/victim/hosts":           "127.0.1.1 box\n",
		image + "/etc/ssh/ssh_host_link": "the host's",
	} {
		if raw, err := os.ReadFile(name); err != nil || string(raw) != wanted {
			t.Errorf("%s: %q %v", name, raw, err)
		}
	}
	if _, err := os.Lstat(image + "/etc/ssh/ssh_host_ed25519_key"); !os.IsNotExist(err) {
		t.Errorf("the key is there: %v", err)
	}
	if left, err := os.ReadDir(image + "/var/sessions"); err != nil || len(left) > 0 {
		t.Errorf("sessions: %v %v", left, err)
	}
	if info, _ := os.Stat(image + "/etc/hosts"); info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v", info.Mode())
	}
}
