package boot

import (
	"encoding/binary"
	"io"
	"runtime"
	"strings"
)

// elfLoader returns the loader (PT_INTERP) that an ELF file for this machine asks for, "" for a static one; false
// when it is no such file. Layout: elf(5). debug/elf would cost the binary 300 KB.
func elfLoader(file io.ReaderAt) (string, bool) {
	const (
		is32, is64     = 1, 2
		littleEndian   = 1
		i386, amd64    = 3, 62
		arm64          = 183
		interpreter    = 3
		maxHeaders     = 256
		maxInterpreter = 4096
	)
	ident := make([]byte, 64)
	if n, err := file.ReadAt(ident, 0); n < 52 || err != nil && err != io.EOF {
		return "", false
	}
	if string(ident[:4]) != "\x7fELF" || ident[5] != littleEndian {
		return "", false
	}
	order := binary.LittleEndian
	class, machine := ident[4], order.Uint16(ident[18:])
	switch {
	case runtime.GOARCH == "amd64" && class == is64 && machine == amd64:
	case runtime.GOARCH == "amd64" && class == is32 && machine == i386:
	case runtime.GOARCH == "arm64" && class == is64 && machine == arm64:
	default:
		return "", false
	}
	var offset, size, count int64
	if class == is64 {
		offset, size, count = int64(order.Uint64(ident[32:])), int64(order.Uint16(ident[54:])), int64(order.Uint16(ident[56:]))
	} else {
		offset, size, count = int64(order.Uint32(ident[28:])), int64(order.Uint16(ident[42:])), int64(order.Uint16(ident[44:]))
	}
	if offset <= 0 || size < 32 || size > 1024 || count > maxHeaders {
		return "", false
	}
	header := make([]byte, size)
	for i := int64(0); i < count; i++ {
		if _, err := file.ReadAt(header, offset+i*size); err != nil {
			return "", false
		}
		if order.Uint32(header) != interpreter {
			continue
		}
		var at, length int64
		if class == is64 {
			if size < 56 {
				return "", false
			}
			at, length = int64(order.Uint64(header[8:])), int64(order.Uint64(header[32:]))
		} else {
			at, length = int64(order.Uint32(header[4:])), int64(order.Uint32(header[16:]))
		}
		if at < 0 || length <= 1 || length > maxInterpreter {
			return "", false
		}
		name := make([]byte, length)
		if _, err := file.ReadAt(name, at); err != nil {
			return "", false
		}
		return strings.TrimRight(string(name), "\x00"), true
	}
	return "", true
}
