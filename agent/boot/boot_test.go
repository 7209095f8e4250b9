package boot

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"strings"
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
		`{"directories":[{"path":"/"}]}`, `{"network":{"interface":"e","address_cidr":"fe80::1/64"}}`, `{"files":[{"path":"/x","content_b64":"!"}]}`, `{"once":{"log":"x"}}`,
		`{"export":{"remove":["etc/x"]}}`, `{"export":{"remove":["/etc/[x"]}}`, `{"export":{"drop_lines":[{"path":"/"}]}}`} {
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

func TestDanglingDirectoriesAreMade(t *testing.T) {
	image := t.TempDir()
	_ = os.Symlink("/gone/etc", image+"/etc")
	r, err := openRoot(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.writeFile(&File{Path: "/etc/hostname", Mode: 0o644, Content: []byte("h\n"), UID: os.Getuid(), GID: os.Getgid()}); err != nil {
		t.Fatal(err)
	}
	if raw, _ := os.ReadFile(image + "/etc/hostname"); string(raw) != "h\n" {
		t.Errorf("%q", raw)
	}
	for i := 0; i < 2; i++ {
		if err := r.symlinkIfAbsent("../proc/self/mounts", "/etc/mtab"); err != nil {
			t.Error(err)
		}
	}
	if target, _ := os.Readlink(image + "/etc/mtab"); target != "../proc/self/mounts" {
		t.Errorf("mtab -> %q", target)
	}
	_ = os.WriteFile(image+"/root", nil, 0o644)
	if err := r.writeFile(&File{Path: "/root/.ssh/authorized_keys"}); err == nil {
		t.Error("written below a file")
	}
}

// program returns an ELF executable that asks for a loader, or none.
func program(t *testing.T, loader string) []byte {
	const machine = 62
	raw := make([]byte, 64+56)
	copy(raw, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(raw[18:], machine)
	if runtime.GOARCH == "arm64" {
		binary.LittleEndian.PutUint16(raw[18:], 183)
	}
	binary.LittleEndian.PutUint64(raw[32:], 64)
	binary.LittleEndian.PutUint16(raw[54:], 56)
	binary.LittleEndian.PutUint16(raw[56:], 1)
	if loader != "" {
		binary.LittleEndian.PutUint32(raw[64:], 3)
		binary.LittleEndian.PutUint64(raw[64+8:], uint64(len(raw)))
		binary.LittleEndian.PutUint64(raw[64+32:], uint64(len(loader)+1))
		raw = append(raw, loader+"\x00"...)
	}
	return raw
}

func TestFindInit(t *testing.T) {
	foreign := program(t, "")
	foreign[18] = 0x15 // EM_PPC64
	for name, c := range map[string]struct {
		files map[string]string // link targets begin with `->`
		want  string
	}{
		"none":                {nil, ""},
		"systemd":             {map[string]string{"/usr/lib/systemd/systemd": string(program(t, "")), "/sbin/init": "->/usr/lib/systemd/systemd"}, "/sbin/init"},
		"systemd, no link":    {map[string]string{"/lib/systemd/systemd": string(program(t, ""))}, "/lib/systemd/systemd"},
		"busybox":             {map[string]string{"/bin/busybox": string(program(t, "")), "/sbin/init": "->../bin/busybox"}, "/sbin/init"},
		"dangling":            {map[string]string{"/sbin/init": "->/lib/systemd/systemd"}, ""},
		"dangling, and other": {map[string]string{"/sbin/init": "->/gone", "/bin/init": string(program(t, ""))}, "/bin/init"},
		"loop":                {map[string]string{"/sbin/init": "->init"}, ""},
		"with a loader":       {map[string]string{"/sbin/init": string(program(t, "/lib/ld.so")), "/lib/ld.so": "x"}, "/sbin/init"},
		"loader missing":      {map[string]string{"/sbin/init": string(program(t, "/lib/ld.so"))}, ""},
		"another machine":     {map[string]string{"/sbin/init": string(foreign)}, ""},
		"script":              {map[string]string{"/sbin/init": "#! /bin/sh -e\n", "/bin/sh": string(program(t, ""))}, "/sbin/init"},
		"script, no shell":    {map[string]string{"/sbin/init": "#!/bin/sh\n"}, ""},
		"script of itself":    {map[string]string{"/sbin/init": "#!/sbin/init\n"}, ""},
		"tini":                {map[string]string{"/usr/bin/tini-static": string(program(t, "")), "/sbin/init": "->/usr/bin/tini-static"}, ""},
		"empty":               {map[string]string{"/sbin/init": ""}, ""},
		"a directory":         {map[string]string{"/sbin/init/x": ""}, ""},
	} {
		image := t.TempDir()
		for path, content := range c.files {
			if err := os.MkdirAll(image+filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(content, "->") {
				_ = os.Symlink(content[2:], image+path)
			} else {
				_ = os.WriteFile(image+path, []byte(content), 0o755)
			}
		}
		r, err := openRoot(image)
		if err != nil {
			t.Fatal(err)
		}
		argv, err := findInit(r, nil)
		if err != nil || strings.Join(argv, " ") != c.want {
			t.Errorf("%s: %v, %v, want %q", name, argv, err, c.want)
		}
		if _, err := findInit(r, []string{"/nosuch"}); err == nil {
			t.Error("a missing override was taken")
		}
	}
}

func FuzzElfLoader(f *testing.F) {
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, raw []byte) { _, _ = elfLoader(bytes.NewReader(raw)) })
}
