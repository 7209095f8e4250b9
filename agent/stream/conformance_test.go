package stream

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
)

func vectors(t testing.TB, name string, into interface{}) {
	t.Helper()
	raw, err := os.ReadFile("../../tests/conformance/vectors/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		t.Fatal(err)
	}
}

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	var all []byte
	for _, word := range strings.Fields(text) { // `78*3` is 787878
		count := 1
		if i := strings.IndexByte(word, '*'); i >= 0 {
			count, _ = strconv.Atoi(word[i+1:])
			word = word[:i]
		}
		raw, err := hex.DecodeString(word)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, bytes.Repeat(raw, count)...)
	}
	return all
}

func TestHostFrameVectors(t *testing.T) {
	var cases []struct {
		Name, Bytes string
		Frames      [][2]interface{}
		Error       bool
	}
	vectors(t, "host_frames", &cases)
	for _, c := range cases {
		raw := unhex(t, c.Bytes)
		for how, source := range map[string]io.Reader{
			"whole": bytes.NewReader(raw), "byte by byte": iotest.OneByteReader(bytes.NewReader(raw)),
		} {
			reader := NewReader(source)
			for i, want := range c.Frames {
				frame, err := reader.Frame()
				if err != nil {
					t.Fatalf("%s, %s: frame %d: %v", c.Name, how, i, err)
				}
				if float64(frame.Type) != want[0].(float64) || !bytes.Equal(frame.Payload, unhex(t, want[1].(string))) {
					t.Errorf("%s, %s: frame %d differs", c.Name, how, i)
				}
			}
			_, err := reader.Frame()
			if got := errors.Is(err, ErrProtocol); got != c.Error {
				t.Errorf("%s, %s: error %v, want a protocol error: %v", c.Name, how, err, c.Error)
			}
			if err == nil {
				t.Errorf("%s, %s: one frame too many", c.Name, how)
			}
		}
	}
}

func TestHelloScanVectors(t *testing.T) {
	var cases []struct {
		Name, Side, Nonce, Bytes, Rest string
		Found                          bool
	}
	vectors(t, "hello_scan", &cases)
	for _, c := range cases {
		if c.Side != "agent" {
			continue
		}
		reader := NewReader(iotest.HalfReader(bytes.NewReader(unhex(t, c.Bytes))))
		hello, err := reader.ScanHello()
		if (err == nil) != c.Found {
			t.Errorf("%s: found %v (%v), want %v", c.Name, err == nil, err, c.Found)
			continue
		}
		if !c.Found {
			continue
		}
		if hello.Nonce != c.Nonce {
			t.Errorf("%s: nonce %s", c.Name, hello.Nonce)
		}
		reader.discardPending()
		rest, _ := io.ReadAll(reader.buffer)
		if hex.EncodeToString(rest) != c.Rest {
			t.Errorf("%s: rest %x", c.Name, rest)
		}
	}
}

func TestWriterRoundTrip(t *testing.T) {
	var sink bytes.Buffer
	w := NewWriter(&sink)
	if err := w.Send(Stdin, []byte("abc")); err != nil {
		t.Fatal(err)
	}
	prepared := append(make([]byte, HeaderBytes), "defg"...)
	if err := w.SendPrepared(TarData, prepared); err != nil {
		t.Fatal(err)
	}
	if err := w.Send(Stdin, make([]byte, MaxPayload+1)); err == nil {
		t.Error("a payload beyond the limit was sent")
	}
	w.Shut()
	if err := w.Send(Stdin, nil); err == nil {
		t.Error("a shut writer wrote")
	}
	r := NewReader(&sink)
	for _, want := range []string{"abc", "defg"} {
		frame, err := r.Frame()
		if err != nil || string(frame.Payload) != want {
			t.Errorf("got %q, %v", frame.Payload, err)
		}
	}
}

func FuzzFrames(f *testing.F) {
	var cases []struct{ Bytes string }
	vectors(f, "host_frames", &cases)
	for _, c := range cases {
		f.Add(unhex(f, c.Bytes))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		reader := NewReader(bytes.NewReader(raw))
		total := 0
		for {
			frame, err := reader.Frame()
			if err != nil {
				break
			}
			total += HeaderBytes + len(frame.Payload)
			if len(frame.Payload) > MaxPayload || total > len(raw) {
				t.Fatalf("frames hold %d bytes of %d", total, len(raw))
			}
		}
	})
}

func FuzzScanHello(f *testing.F) {
	var cases []struct{ Bytes string }
	vectors(f, "hello_scan", &cases)
	for _, c := range cases {
		f.Add(unhex(f, c.Bytes))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		hello, err := NewReader(bytes.NewReader(raw)).ScanHello()
		if err == nil && (!validNonce(hello.Nonce) || !bytes.Contains(raw, []byte(Magic))) {
			t.Fatal("a HELLO out of nothing")
		}
	})
}
