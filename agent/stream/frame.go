// Package stream owns frames, links (a port or a connection) and the life of one stream:
// HELLO, one request, BYE. What a request does is its handler's affair. See ../PROTOCOL.md.
package stream

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// The numbers of PROTOCOL.md.
const (
	Version      = 1
	HeaderBytes  = 5
	MaxPayload   = 65536
	MaxRequest   = 8 << 20
	MaxHello     = 1024
	Magic        = "\xf5BANGER\n"
	StdinWindow  = 256 << 10
	helloMinimum = HeaderBytes + len(Magic)
)

// Frame types.
const (
	Hello       = 0x01
	HelloOK     = 0x02
	RequestPart = 0x03
	Request     = 0x04
	End         = 0x05
	Error       = 0x06
	Bye         = 0x07
	ByeOK       = 0x08
	Stdin       = 0x10
	StdinEOF    = 0x11
	Resize      = 0x12
	Signal      = 0x13
	Stdout      = 0x20
	Stderr      = 0x21
	StdinCredit = 0x22
	Exit        = 0x23
	Started     = 0x24
	TarData     = 0x30
	TarEOF      = 0x31
	Data        = 0x40
	DataEOF     = 0x41
	ForwardOK   = 0x42
	Missed      = 0x50
	Restarted   = 0x51
)

// fromHost is the set of types that the agent takes.
var fromHost = [256]bool{
	Hello: true, RequestPart: true, Request: true, Bye: true,
	Stdin: true, StdinEOF: true, Resize: true, Signal: true,
	TarData: true, TarEOF: true, Data: true, DataEOF: true,
}

// Frame is one frame; Payload is valid until the next read from the same Reader.
type Frame struct {
	Type    byte
	Payload []byte
}

// ErrProtocol is wrapped by every error that says that the host's bytes make no sense.
var ErrProtocol = errors.New("protocol error")

// Reader decodes frames.
type Reader struct {
	buffer  *bufio.Reader
	pending int
}

// NewReader returns a decoder of source.
func NewReader(source io.Reader) *Reader {
	return &Reader{buffer: bufio.NewReaderSize(source, HeaderBytes+MaxPayload)}
}

// Reset forgets everything read so far.
func (r *Reader) Reset(source io.Reader) {
	r.buffer.Reset(source)
	r.pending = 0
}

func (r *Reader) discardPending() {
	if r.pending > 0 {
		_, _ = r.buffer.Discard(r.pending) // it was peeked: it is there
		r.pending = 0
	}
}

// Frame returns the next frame; io.EOF only at a frame's edge.
func (r *Reader) Frame() (Frame, error) {
	r.discardPending()
	header, err := r.buffer.Peek(HeaderBytes)
	if err != nil {
		if err == io.EOF && len(header) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	kind, length := header[0], binary.BigEndian.Uint32(header[1:])
	if !fromHost[kind] {
		return Frame{}, fmt.Errorf("%w: frame type 0x%02x", ErrProtocol, kind)
	}
	if length > MaxPayload {
		return Frame{}, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, length)
	}
	whole, err := r.buffer.Peek(HeaderBytes + int(length))
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	r.pending = len(whole)
	return Frame{kind, whole[HeaderBytes:]}, nil
}

// HelloBody is the JSON of HELLO.
type HelloBody struct {
	Version int    `json:"version"`
	Nonce   string `json:"nonce"`
}

// parseHello returns the body of a HELLO payload, or nil when it is none.
func parseHello(payload []byte) *HelloBody {
	if len(payload) > MaxHello || !bytes.HasPrefix(payload, []byte(Magic)) {
		return nil
	}
	body := new(HelloBody)
	if json.Unmarshal(payload[len(Magic):], body) != nil || !validNonce(body.Nonce) {
		return nil
	}
	return body
}

func validNonce(nonce string) bool {
	if len(nonce) != 32 {
		return false
	}
	for _, c := range []byte(nonce) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// ScanHello skips bytes until a whole HELLO frame.
func (r *Reader) ScanHello() (*HelloBody, error) {
	r.discardPending()
	for {
		head, err := r.buffer.Peek(helloMinimum)
		if err != nil {
			return nil, err
		}
		if head[0] == Hello && string(head[HeaderBytes:]) == Magic {
			length := binary.BigEndian.Uint32(head[1:])
			if length >= uint32(len(Magic)) && length <= MaxHello {
				whole, err := r.buffer.Peek(HeaderBytes + int(length))
				if err != nil {
					return nil, err
				}
				if body := parseHello(whole[HeaderBytes:]); body != nil {
					r.pending = len(whole)
					return body, nil
				}
			}
		}
		_, _ = r.buffer.Discard(1)
	}
}

// Writer encodes frames; each goes out whole, whoever else writes.
type Writer struct {
	mutex  sync.Mutex
	sink   io.Writer
	buffer []byte
	shut   bool
}

// NewWriter returns an encoder onto sink.
func NewWriter(sink io.Writer) *Writer {
	return &Writer{sink: sink}
}

// Send writes one frame of at most MaxPayload bytes.
func (w *Writer) Send(kind byte, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("frame 0x%02x of %d bytes", kind, len(payload))
	}
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if w.shut {
		return ErrHungUp
	}
	w.buffer = append(w.buffer[:0], kind, 0, 0, 0, 0)
	binary.BigEndian.PutUint32(w.buffer[1:], uint32(len(payload)))
	w.buffer = append(w.buffer, payload...)
	_, err := w.sink.Write(w.buffer)
	return err
}

// SendPrepared writes a frame whose payload stands at buffer[HeaderBytes:]; the header is filled in.
func (w *Writer) SendPrepared(kind byte, buffer []byte) error {
	buffer[0] = kind
	binary.BigEndian.PutUint32(buffer[1:], uint32(len(buffer)-HeaderBytes))
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if w.shut {
		return ErrHungUp
	}
	_, err := w.sink.Write(buffer)
	return err
}

// Shut makes every later write fail: the port now belongs to another stream.
func (w *Writer) Shut() {
	w.mutex.Lock()
	w.shut = true
	w.mutex.Unlock()
}

// SendJSON writes one frame of JSON.
func (w *Writer) SendJSON(kind byte, value interface{}) error {
	payload, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return w.Send(kind, payload)
}
