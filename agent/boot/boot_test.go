package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestParseConfig(t *testing.T) {
	config, err := ParseConfig([]byte(`{"hostname":"h","drives":{"base":"serial:b","own":"serial:o","modules":null},
		"files":[{"path":"/etc/hostname","content_b64":"aAo="}],"network":{"interface":"eth0","address_cidr":"10.0.2.15/24"},"future":1}`))
	if err != nil {
		t.Fatal(err)
	}
	if string(config.Files[0].Content) != "h\n" || config.Files[0].Mode != 0o644 || config.Drives.Modules != nil {
		t.Errorf("%+v", config)
	}
	for _, bad := range []string{`{`, `{"files":[{"path":"etc/x"}]}`, `{"files":[{"path":"/a/../b"}]}`,
		`{"directories":[{"path":"/"}]}`, `{"network":{"interface":"e","address_cidr":"fe80::1/64"}}`, `{"files":[{"path":"/x","content_b64":"!"}]}`} {
		if _, err := ParseConfig([]byte(bad)); err == nil {
			t.Errorf("%s: taken", bad)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(`{"files":[{"path":"/a","content_b64":"aAo="}],"network":{"address_cidr":"10.0.0.1/8"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) { _, _ = ParseConfig(raw) })
}

func TestFilesStayInsideTheRoot(t *testing.T) {
	base := t.TempDir()
	image := filepath.Join(base, "image")
	if err := os.MkdirAll(image+"/inner", 0o755); err != nil {
		t.Fatal(err)
	}
	_ = os.Symlink("/inner", image+"/etc")
	_ = os.Symlink("/../../../victim", image+"/up")
	_ = os.WriteFile(base+"/victim", []byte("v"), 0o644)
	_ = os.Symlink(base+"/victim", image+"/inner/hosts")
	r, err := openRoot(image)
	if err != nil {
		t.Fatal(err)
	}
	file := &File{Path: "/etc/hosts", Mode: 0o640, Content: []byte("mine"), UID: os.Getuid(), GID: os.Getgid()}
	if err := r.writeFile(file); err != nil {
		t.Fatal(err)
	}
	if raw, _ := os.ReadFile(image + "/inner/hosts"); string(raw) != "mine" {
		t.Errorf("content %q", raw)
	}
	if raw, _ := os.ReadFile(base + "/victim"); string(raw) != "v" {
		t.Error("written through a symlink")
	}
	if info, _ := os.Lstat(image + "/inner/hosts"); info.Mode() != 0o640 {
		t.Errorf("mode %v", info.Mode())
	}
	file.Content, file.KeepLines = []byte("ours\nmine\n"), true
	for i := 0; i < 2; i++ {
		if err := r.writeFile(file); err != nil {
			t.Fatal(err)
		}
		if raw, _ := os.ReadFile(image + "/inner/hosts"); string(raw) != "mine\nours\n" {
			t.Errorf("keep_lines wrote %q", raw)
		}
	}
	if err := os.Remove(image + "/inner/hosts"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(base+"/victim", image+"/inner/hosts"); err != nil {
		t.Fatal(err)
	}
	if err := r.writeFile(file); err != nil {
		t.Fatal(err)
	}
	if raw, _ := os.ReadFile(image + "/inner/hosts"); string(raw) != "ours\nmine\n" {
		t.Errorf("keep_lines read through a symlink: %q", raw)
	}
	if err := r.makeDirectory(&Directory{Path: "/a/b", Mode: 0o700, UID: os.Getuid(), GID: os.Getgid()}); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(image + "/a/b"); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v %v", info, err)
	}
}

func TestFindInit(t *testing.T) {
	image := t.TempDir()
	r, err := openRoot(image)
	if err != nil {
		t.Fatal(err)
	}
	if argv, err := findInit(r, nil); argv != nil || err != nil {
		t.Errorf("none: %v %v", argv, err)
	}
	_ = os.MkdirAll(image+"/usr/lib/systemd", 0o755)
	_ = os.WriteFile(image+"/usr/lib/systemd/systemd", nil, 0o755)
	_ = os.Mkdir(image+"/sbin", 0o755)
	_ = os.Symlink("/usr/lib/systemd/systemd", image+"/sbin/init")
	if argv, _ := findInit(r, nil); len(argv) != 1 || argv[0] != "/sbin/init" {
		t.Errorf("%v", argv)
	}
	if _, err := findInit(r, []string{"/nosuch"}); err == nil {
		t.Error("a missing override was taken")
	}
}
