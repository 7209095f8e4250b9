package keeplog

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func run(t *testing.T, before string, limit, kept int64, parts ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	reader, writer := io.Pipe()
	go func() {
		for _, part := range parts {
			_, _ = writer.Write([]byte(part))
		}
		writer.Close()
	}()
	if err := Run(path, limit, kept, reader); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

func TestWhatFitsStaysWhole(t *testing.T) {
	if got := run(t, "old\n", 100, 10, "one\n", "two\n"); got != "old\none\ntwo\n" {
		t.Fatalf("%q", got)
	}
}

func TestTheEndOfALongStreamIsKept(t *testing.T) {
	if got := run(t, "", 20, 4, "0123456789", "0123456789", "abcd"); got != Cut+"abcd" {
		t.Fatalf("%q", got)
	}
}

func TestTheFileNeverGrowsFarOverItsLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	input := io.LimitReader(zeros{}, 50<<20)
	if err := Run(path, 1<<20, 1<<18, input); err != nil {
		t.Fatal(err)
	}
	status, err := os.Stat(path)
	if err != nil || status.Size() > 1<<20+chunk {
		t.Fatal(status.Size(), err)
	}
	got, _ := os.ReadFile(path)
	if !bytes.HasPrefix(got, []byte(Cut)) {
		t.Fatalf("%q", got[:40])
	}
}

func TestNonsenseIsRefused(t *testing.T) {
	for _, sizes := range [][2]int64{{10, 10}, {10, 0}, {0, 1}, {-1, -2}} {
		if Run(filepath.Join(t.TempDir(), "log"), sizes[0], sizes[1], bytes.NewReader(nil)) == nil {
			t.Fatal(sizes)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }
