package shell

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func tree(t *testing.T, files ...string) string {
	root := t.TempDir()
	for _, path := range files {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFind(t *testing.T) {
	for _, c := range []struct {
		own, path string
		files     []string
		want      string
	}{
		{"/bin/fish", "/bin", []string{"/bin/fish", "/bin/bash"}, "/bin/fish"},
		{"/bin/fish", "/bin", []string{"/bin/sh", "/bin/bash"}, "/bin/bash"},
		{"/sbin/nologin", "/bin", []string{"/sbin/nologin", "/bin/sh"}, "/bin/sh"},
		{"/bin/sh", "/opt/bin", []string{"/opt/bin/bash"}, "/opt/bin/bash"},
		{"/bin/sh", "relative:", []string{"/bin/busybox"}, "/bin/busybox sh"},
		{"/bin/sh", "/bin", []string{"/busybox/sh"}, "/busybox/sh"},
		{"", "/bin", []string{"/bin/cat"}, ""},
	} {
		if got := strings.Join(Find(tree(t, c.files...), c.own, c.path), " "); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestEnabled(t *testing.T) {
	for _, c := range []struct {
		files []string
		want  bool
	}{
		{[]string{"/usr/sbin/sshd"}, false},
		{[]string{"/etc/systemd/system/multi-user.target.wants/ssh.service"}, false},
		{[]string{"/usr/sbin/sshd", "/etc/systemd/system/multi-user.target.wants/ssh.service"}, true},
		{[]string{"/usr/sbin/sshd", "/etc/systemd/system/sockets.target.wants/sshd.socket"}, true},
		{[]string{"/usr/sbin/sshd", "/etc/rc2.d/S01ssh"}, true},
		{[]string{"/usr/sbin/sshd", "/etc/runlevels/default/sshd"}, true},
	} {
		if got := Enabled(tree(t, c.files...)); got != c.want {
			t.Errorf("%v: %v", c.files, got)
		}
	}
}
