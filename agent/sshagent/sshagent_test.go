package sshagent

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"banger/agent/stream"
	"banger/agent/system"
)

const patience = 10 * time.Second

// host is the other side of one ssh_agent stream.
type host struct {
	t    *testing.T
	link stream.Link
	w    *stream.Writer
	path string
	done chan struct{}
}

func begin(t *testing.T) *host {
	t.Helper()
	system.DryRun = true
	directory, err := os.MkdirTemp("", "ssh") // short: t.TempDir() may be longer than sun_path
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", directory)
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := stream.NewLink(fds[0], "agent", false)
	if err != nil {
		t.Fatal(err)
	}
	link, err := stream.NewLink(fds[1], "host", false)
	if err != nil {
		t.Fatal(err)
	}
	_ = link.SetReadDeadline(time.Now().Add(patience))
	h := &host{t: t, link: link, w: stream.NewWriter(link), done: make(chan struct{})}
	server := &stream.Server{
		Mode: "test", Uptime: func() float64 { return 1 }, Log: t.Logf,
		Handlers: map[string]stream.Handler{"ssh_agent": Handle},
	}
	go func() {
		defer close(h.done)
		server.ServeConnection(ours, nil)
	}()
	t.Cleanup(func() {
		link.Close()
		h.wait()
		os.RemoveAll(directory)
	})
	hello := stream.Magic + `{"version":1,"nonce":"0123456789abcdef0123456789abcdef"}`
	if err := h.w.Send(stream.Hello, []byte(hello)); err != nil {
		t.Fatal(err)
	}
	h.want(stream.HelloOK)
	uid := strconv.Itoa(os.Getuid())
	if err := h.w.SendJSON(stream.Request, map[string]string{"kind": "ssh_agent", "user": uid}); err != nil {
		t.Fatal(err)
	}
	var started struct{ Path string }
	if err := json.Unmarshal(h.want(stream.Started), &started); err != nil {
		t.Fatal(err)
	}
	h.path = started.Path
	return h
}

func (h *host) wait() {
	h.t.Helper()
	select {
	case <-h.done:
	case <-time.After(patience):
		h.t.Error("the agent serves on")
	}
}

func (h *host) frame() (byte, []byte) {
	h.t.Helper()
	var header [stream.HeaderBytes]byte
	if _, err := io.ReadFull(h.link, header[:]); err != nil {
		h.t.Fatal(err)
	}
	payload := make([]byte, binary.BigEndian.Uint32(header[1:]))
	if _, err := io.ReadFull(h.link, payload); err != nil {
		h.t.Fatal(err)
	}
	return header[0], payload
}

func (h *host) want(kind byte) []byte {
	h.t.Helper()
	got, payload := h.frame()
	if got != kind {
		h.t.Fatalf("frame 0x%02x %q, want 0x%02x", got, payload, kind)
	}
	return payload
}

// asked returns the channel and the bytes of the next DATA.
func (h *host) asked() (uint32, string) {
	h.t.Helper()
	payload := h.want(stream.Data)
	return binary.BigEndian.Uint32(payload), string(payload[idBytes:])
}

func (h *host) answer(id uint32, data string) {
	h.t.Helper()
	if err := h.w.Send(stream.Data, append(binary.BigEndian.AppendUint32(nil, id), data...)); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) dial() net.Conn {
	h.t.Helper()
	connection, err := net.Dial("unix", h.path)
	if err != nil {
		h.t.Fatal(err)
	}
	_ = connection.SetDeadline(time.Now().Add(patience))
	h.t.Cleanup(func() { connection.Close() })
	return connection
}

func say(t *testing.T, connection net.Conn, text string) {
	t.Helper()
	if _, err := connection.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, connection net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(connection, got); err != nil || string(got) != want {
		t.Fatalf("heard %q, %v; want %q", got, err, want)
	}
}

func closed(t *testing.T, connection net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, connection); err != nil && !bytes.Contains([]byte(err.Error()), []byte("reset")) {
		t.Fatalf("not closed: %v", err)
	}
}

func TestChannelsAreApartAndNumbersAreNew(t *testing.T) {
	h := begin(t)
	first, second := h.dial(), h.dial()
	say(t, first, "one")
	id1, text := h.asked()
	if text != "one" {
		t.Fatal(text)
	}
	say(t, second, "two")
	id2, text := h.asked()
	if text != "two" || id2 == id1 {
		t.Fatal(id1, id2, text)
	}
	h.answer(id2, "for two")
	h.answer(id1, "for one")
	hear(t, first, "for one")
	hear(t, second, "for two")
	first.Close()
	if id, text := h.asked(); id != id1 || text != "" {
		t.Fatal(id, text)
	}
	h.answer(id1, "too late") // ignored
	h.answer(id2, "last words")
	h.answer(id2, "")
	hear(t, second, "last words")
	closed(t, second)
	if id, text := h.asked(); id != id2 || text != "" {
		t.Fatal(id, text)
	}
	third := h.dial()
	say(t, third, "three")
	if id, _ := h.asked(); id <= id1 || id <= id2 {
		t.Fatal("a number came again:", id)
	}
}

func TestTheSocketIsTheUsersAloneAndGoesWithTheStream(t *testing.T) {
	for name, end := range map[string]func(*host){
		"BYE": func(h *host) {
			_ = h.w.Send(stream.Bye, nil)
			for kind := byte(stream.Data); kind != stream.ByeOK; { // the ends of channels may come before
				if kind, _ = h.frame(); kind != stream.ByeOK && kind != stream.Data {
					h.t.Fatalf("frame 0x%02x", kind)
				}
			}
		},
		"hang-up": func(h *host) { h.link.Close(); h.wait() },
		"nonsense": func(h *host) {
			h.answer(1, "")
			_ = h.w.Send(stream.Data, []byte{1, 2})
			h.want(stream.Error)
			h.wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := begin(t)
			for path, mode := range map[string]os.FileMode{h.path: 0o600, filepath.Dir(h.path): 0o700} {
				info, err := os.Stat(path)
				if err != nil || info.Mode().Perm() != mode {
					t.Fatal(path, info, err)
				}
			}
			connection := h.dial()
			if name == "BYE" { // with a channel open and bytes on their way, too
				say(t, connection, "x")
				h.asked()
			}
			end(h)
			if _, err := os.Lstat(filepath.Dir(h.path)); !os.IsNotExist(err) {
				t.Errorf("left behind: %v", err)
			}
		})
	}
}

func TestAProgramThatDoesNotReadIsCutOffAndHoldsUpNobody(t *testing.T) {
	h := begin(t)
	deaf, other := h.dial(), h.dial()
	say(t, deaf, "deaf")
	deafID, _ := h.asked()
	say(t, other, "other")
	otherID, _ := h.asked()
	sent := 0
	for chunk := string(make([]byte, 60000)); sent < maxQueued+(1<<20); sent += len(chunk) {
		h.answer(deafID, chunk)
	}
	if id, text := h.asked(); id != deafID || text != "" {
		t.Fatal(id, len(text))
	}
	h.answer(otherID, "still here")
	hear(t, other, "still here")
	closed(t, deaf)
}

func TestMoreConnectionsThanChannelsWait(t *testing.T) {
	h := begin(t)
	var first net.Conn
	var firstID uint32
	for i := 0; i < maxChannels; i++ {
		connection := h.dial()
		say(t, connection, "x")
		id, _ := h.asked()
		if i == 0 {
			first, firstID = connection, id
		}
	}
	waiting := h.dial()
	say(t, waiting, "late")
	first.Close()
	if id, text := h.asked(); id != firstID || text != "" { // and not the late one
		t.Fatal(id, text)
	}
	id, text := h.asked()
	if text != "late" {
		t.Fatal(text)
	}
	h.answer(id, "served")
	hear(t, waiting, "served")
}

func TestNumbersGrowHoweverManyBeginAtOnce(t *testing.T) {
	h := begin(t)
	for i := 0; i < 4*maxChannels; i++ {
		go func() {
			connection, err := net.Dial("unix", h.path)
			if err == nil {
				_, _ = connection.Write([]byte("x"))
				_, _ = io.Copy(io.Discard, connection)
				connection.Close()
			}
		}()
	}
	last := uint32(0)
	for begun := 0; begun < 4*maxChannels; {
		id, text := h.asked()
		if text == "" {
			continue // the end of one
		}
		if id <= last {
			t.Fatalf("%d after %d", id, last)
		}
		last = id
		begun++
		h.answer(id, "")
	}
}

func TestAnUnknownUserIsAnError(t *testing.T) {
	system.DryRun = true
	err := Handle(nil, []byte(`{"user":"no such user"}`))
	if stream.AsFailure(err).Code != "no_user" {
		t.Fatal(err)
	}
}

func TestASymlinkInTheDirectorysPlaceIsNotFollowed(t *testing.T) {
	h := begin(t)
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.Mkdir(victim, 0o700); err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(victim, socketName)
	if err := os.WriteFile(kept, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	directory := filepath.Dir(h.path)
	if err := os.Rename(directory, directory+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(victim, directory); err != nil {
		t.Fatal(err)
	}
	h.link.Close()
	h.wait()
	if _, err := os.Lstat(kept); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(directory+".moved", socketName)); !os.IsNotExist(err) {
		t.Error("the socket itself is still there", err)
	}
}
