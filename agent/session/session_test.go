package session

import (
	"bytes"
	"encoding/base64"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/agent/exec"
)

func readAll(t *testing.T, r *reader) (data []byte, missed int64) {
	t.Helper()
	buffer := make([]byte, 5000)
	for {
		count, gone, err := r.read(buffer, 1<<62)
		if err != nil {
			t.Fatal(err)
		}
		missed += gone
		if count == 0 {
			return data, missed
		}
		data = append(data, buffer[:count]...)
	}
}

func TestOutputKeepsItsEnd(t *testing.T) {
	random := rand.New(rand.NewSource(1))
	for round := 0; round < 50; round++ {
		prefix := filepath.Join(t.TempDir(), "stdout")
		o := &output{prefix: prefix, limit: minLimit}
		follower := &reader{of: o}
		var all, followed []byte
		for i := 0; i < random.Intn(60); i++ {
			piece := make([]byte, random.Intn(20000))
			random.Read(piece)
			o.add(piece)
			all = append(all, piece...)
			if random.Intn(3) > 0 {
				data, missed := readAll(t, follower)
				followed = append(followed, make([]byte, missed)...)
				if !bytes.Equal(data, all[len(followed):]) {
					t.Fatal("a follower reads something else")
				}
				followed = append(followed, data...)
			}
		}
		follower.close()
		for _, kept := range []*output{o, loadOutput(prefix, minLimit)} {
			start, end := kept.span()
			if end != int64(len(all)) || end-start > minLimit || (start > 0 && end-start < minLimit*(parts-1)/parts) {
				t.Fatalf("kept %d..%d of %d", start, end, len(all))
			}
			late := &reader{of: kept}
			data, missed := readAll(t, late)
			late.close()
			if missed != start || !bytes.Equal(data, all[start:]) {
				t.Fatalf("missed %d instead of %d", missed, start)
			}
		}
		o.endSegment()
		files, _ := filepath.Glob(prefix + ".*")
		var size int64
		for _, file := range files {
			info, _ := os.Stat(file)
			size += info.Size()
		}
		if size > minLimit {
			t.Fatalf("%d bytes on disk", size)
		}
	}
}

func TestOutputGoesOnWhereNothingCanBeWritten(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "gone")
	o := &output{prefix: directory + "/stdout", limit: minLimit}
	o.add([]byte("lost"))
	if err := os.Mkdir(directory, 0o700); err != nil {
		t.Fatal(err)
	}
	o.add([]byte("kept"))
	data, missed := readAll(t, &reader{of: o})
	if string(data) != "kept" || missed != 4 {
		t.Fatalf("%q after %d", data, missed)
	}
}

func TestSegmentsThatNobodyWroteEndNobody(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "stdout")
	for name, content := range map[string]string{"0": "long one", "3": "in it", "5": "and another", "x": "", "-1": "y"} {
		if err := os.WriteFile(prefix+"."+name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	o := loadOutput(prefix, minLimit)
	data, missed := readAll(t, &reader{of: o})
	if string(data) != "and another" || missed != 5 || o.end != 16 {
		t.Fatalf("%q after %d, to %d", data, missed, o.end)
	}
}

func TestEndsWhileItBeginsAgain(t *testing.T) {
	for i := 0; i < 8; i++ {
		x := newTest(t, "on-failure", "sh", "-c", "exit 1")
		waitFor(t, x, func() bool { return x.snapshot().State == restarting })
		time.Sleep(time.Duration(470+8*i) * time.Millisecond)
		if err := x.end("stopped", time.Second); err != nil {
			t.Fatal(err)
		}
		if b := x.snapshot(); b.State != ended || b.Reason != "stopped" {
			t.Fatalf("%+v", b)
		}
	}
}

func TestOutputAtASecond(t *testing.T) {
	o := &output{prefix: filepath.Join(t.TempDir(), "stdout"), limit: minLimit}
	o.add([]byte("before"))
	o.segments[0].marks[0].second -= 100
	o.add([]byte("after"))
	now := time.Now().Unix()
	for second, want := range map[int64]int64{0: 0, now - 50: 6, now + 100: 11} {
		if got := o.at(second); got != want {
			t.Errorf("at %d: %d instead of %d", second-now, got, want)
		}
	}
}

func newTest(t *testing.T, restart string, argv ...string) *session {
	t.Helper()
	NoCgroups = true
	b := body{Name: "test", ID: "0", StdinMode: "pipe", Restart: restart, LogLimit: minLimit, Machine: machineID()}
	for _, word := range argv {
		b.Argv = append(b.Argv, base64.StdEncoding.EncodeToString([]byte(word)))
	}
	x := newSession(t.TempDir(), b)
	x.request = &exec.Request{Argv: argv, Env: map[string]string{}, Stdin: true}
	x.tree = newTree(b.ID)
	if err := x.begin(nil); err != nil {
		t.Fatal(err)
	}
	return x
}

func TestEndsWithItsTree(t *testing.T) {
	x := newTest(t, "on-failure", "sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000 & echo up; wait; wait; wait")
	waitFor(t, x, func() bool { return x.snapshot().Stdout.End > 0 })
	if err := x.end("stopped", 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	b := x.snapshot()
	if b.State != ended || b.Reason != "stopped" || b.Exit == nil || len(x.tree.pids()) != 0 {
		t.Fatalf("%+v", b)
	}
	y, foreign := restore(x.directory)
	if foreign || y == nil || y.snapshot().State != ended || y.snapshot().Reason != "stopped" {
		t.Fatalf("restored %+v", y)
	}
}

func TestBeginsAgainAfterAFailure(t *testing.T) {
	x := newTest(t, "on-failure", "sh", "-c", `n=$(cat "$0" 2>/dev/null); echo "run$n"; echo x >>"$0"; test "$n" = x`, filepath.Join(t.TempDir(), "count"))
	<-x.done
	b := x.snapshot()
	if b.Restarts != 1 || *b.Exit.Code != 0 || b.Reason != "" {
		t.Fatalf("%+v", b)
	}
	data, _ := readAll(t, &reader{of: x.outputs[0]})
	if string(data) != "run\nrunx\n" {
		t.Fatalf("%q", data)
	}
}

func TestInputOutlivesItsWriter(t *testing.T) {
	x := newTest(t, "no", "cat")
	for _, text := range []string{"one\n", "two\n"} {
		v := &viewer{x: x, r: &request{}, cancelled: make(chan struct{})}
		if _, err := v.enter(); err != nil {
			t.Fatal(err)
		}
		other := &viewer{x: x, r: &request{}, cancelled: make(chan struct{})}
		if _, err := other.enter(); err == nil || !strings.HasPrefix(err.Error(), "busy") {
			t.Fatalf("a second writer: %v", err)
		}
		if err := x.push(v, []byte(text)); err != nil {
			t.Fatal(err)
		}
		v.leave()
	}
	waitFor(t, x, func() bool { return x.snapshot().Stdout.End == 8 })
	last := &viewer{x: x, r: &request{}, cancelled: make(chan struct{})}
	if _, err := last.enter(); err != nil {
		t.Fatal(err)
	}
	x.pushEnd(last)
	last.leave()
	<-x.done
	if b := x.snapshot(); *b.Exit.Code != 0 {
		t.Fatalf("%+v", b)
	}
}

func waitFor(t *testing.T, x *session, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not happen: %+v", x.snapshot())
		}
	}
}

func TestNames(t *testing.T) {
	for name, want := range map[string]bool{"a": true, "planner-2.x_y": true, "": false, ".a": false, "-a": false, "a/b": false, strings.Repeat("a", 65): false, "é": false} {
		if validName(name) != want {
			t.Errorf("%q", name)
		}
	}
}
