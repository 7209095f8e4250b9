// Package keeplog keeps the end of a stream in a file that cannot grow without bound. It runs on the host,
// beside a VMM: its stdin is the guest's serial console, and a guest writes there what it likes.
package keeplog

import (
	"fmt"
	"io"
	"os"
)

const chunk = 64 << 10

// Cut stands in the place of what was dropped.
const Cut = "[earlier lines were cut]\n"

// Run appends input to the file at path until input ends. When the file is longer than limit, only its last kept bytes stay.
func Run(path string, limit, kept int64, input io.Reader) error {
	if kept <= 0 || kept >= limit {
		return fmt.Errorf("cannot keep %d of %d bytes", kept, limit)
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	buffer := make([]byte, chunk)
	for {
		count, readErr := input.Read(buffer)
		if count > 0 {
			// A full disk loses lines of a log; the stream has to be read all the same, or its writer stands still.
			_, _ = file.Write(buffer[:count])
			if err := trim(file, limit, kept); err != nil {
				return err
			}
		}
		if readErr == io.EOF {
			return nil
		}
		if readErr != nil {
			return readErr
		}
	}
}

// trim cuts the file where it is too long. Whoever follows it sees it shrink, as a log that is rotated in place.
func trim(file *os.File, limit, kept int64) error {
	status, err := file.Stat()
	if err != nil || status.Size() <= limit {
		return err
	}
	tail := make([]byte, kept)
	count, err := file.ReadAt(tail, status.Size()-kept)
	if err != nil && err != io.EOF {
		return err
	}
	if err := file.Truncate(0); err != nil {
		return err
	}
	_, _ = file.Write(append([]byte(Cut), tail[:count]...))
	return nil
}
