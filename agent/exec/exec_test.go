package exec

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"sort"
	"syscall"
	"testing"
)

func TestRequestVectors(t *testing.T) {
	raw, err := os.ReadFile("../../tests/conformance/vectors/exec_requests.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name, JSON string
		OK         bool
	}
	if err := json.Unmarshal(raw, &cases); err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		if _, err := ParseRequest([]byte(c.JSON)); (err == nil) != c.OK {
			t.Errorf("%s: %v", c.Name, err)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"argv":["YQ=="],"env":{"QQ==":"Qg=="},"tty":{"rows":1,"cols":2}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		request, err := ParseRequest(raw)
		if err == nil && len(request.Argv) == 0 {
			t.Fatal("no argv")
		}
	})
}

func etc(t *testing.T) string {
	directory := t.TempDir()
	for name, content := range map[string]string{
		"passwd":      "root:x:0:0:root:/root:/bin/bash\nbroken line\nbob:x:1000:1001::/home/bob:\n",
		"group":       "root:x:0:\nwheel:x:10:bob,eve\nbob:x:1001:\ndocker:x:999:bob\n",
		"environment": "# comment\nA=1\nexport B=\"two words\"\nC='x'\nnonsense\n=y\n",
	} {
		if err := os.WriteFile(filepath.Join(directory, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return directory
}

func TestLookUp(t *testing.T) {
	directory := etc(t)
	for spec, want := range map[string]*Account{
		"root":       {"root", 0, 0, []uint32{}, "/root", "/bin/bash"},
		"":           {"root", 0, 0, []uint32{}, "/root", "/bin/bash"},
		"bob":        {"bob", 1000, 1001, []uint32{10, 999}, "/home/bob", "/bin/sh"},
		"1000":       {"bob", 1000, 1001, []uint32{10, 999}, "/home/bob", "/bin/sh"},
		"bob:docker": {"bob", 1000, 999, []uint32{10, 999}, "/home/bob", "/bin/sh"},
		"bob:5":      {"bob", 1000, 5, []uint32{10, 999}, "/home/bob", "/bin/sh"},
		"4242":       {"4242", 4242, 0, []uint32{}, "/", "/bin/sh"},
		"4242:77":    {"4242", 4242, 77, []uint32{}, "/", "/bin/sh"},
		"4242:wheel": {"4242", 4242, 10, []uint32{}, "/", "/bin/sh"},
		"0":          {"root", 0, 0, []uint32{}, "/root", "/bin/bash"},
		"nobody":     nil, "bob:nogroup": nil, "bob:": nil,
	} {
		got, err := LookUp(spec, directory)
		if want == nil {
			if err == nil {
				t.Errorf("%q: found %+v", spec, got)
			}
		} else if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v, want %+v", spec, got, err, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	account := &Account{Name: "bob", Home: "/home/bob", Shell: "/bin/sh"}
	request := &Request{Env: map[string]string{"A": "mine"}, TTY: &TTY{Term: "vt100"}}
	defer func() { ImageEnvironment = nil }()
	ImageEnvironment = map[string]string{"A": "image", "C": "image", "PATH": "/go/bin:/bin", "": "x", "BAD": "a\x00b"}
	got := environment(request, account, etc(t))
	sort.Strings(got)
	want := []string{"A=mine", "B=two words", "C=image", "HOME=/home/bob", "LANG=C.UTF-8", "LOGNAME=bob",
		"PATH=/go/bin:/bin", "SHELL=/bin/sh", "TERM=vt100", "USER=bob"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q", got)
	}
	request.ExactEnv = true
	if got := environment(request, account, etc(t)); !reflect.DeepEqual(got, []string{"A=mine"}) {
		t.Errorf("exact: %q", got)
	}
}

func TestLookUpWithoutFiles(t *testing.T) {
	nothing := t.TempDir()
	for spec, want := range map[string]*Account{
		"root": {"root", 0, 0, []uint32{}, "/root", "/bin/sh"},
		"0:0":  {"0", 0, 0, []uint32{}, "/root", "/bin/sh"},
		"7:8":  {"7", 7, 8, []uint32{}, "/", "/bin/sh"},
		"app":  nil, "7:staff": nil,
	} {
		got, err := LookUp(spec, nothing)
		if want == nil {
			if err == nil {
				t.Errorf("%q: found %+v", spec, got)
			}
		} else if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v, want %+v", spec, got, err, want)
		}
	}
}

func TestOddFilesAreNotWaitedFor(t *testing.T) {
	directory := t.TempDir()
	for _, name := range []string{"passwd", "environment"} {
		if err := syscall.Mkfifo(filepath.Join(directory, name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if account, err := LookUp("root", directory); err != nil || account.UID != 0 {
		t.Errorf("%+v %v", account, err)
	}
	if values := etcEnvironment(directory + "/environment"); len(values) != 0 {
		t.Errorf("%v", values)
	}
}
