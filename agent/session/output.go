package session

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	parts    = 4    // segments that the limit is divided into: at least three quarters of it are kept
	maxMarks = 4096 // of one segment
)

// output keeps the end of what one stream of a process said, in segment files. A position counts the bytes since the first start.
type output struct {
	mutex    sync.Mutex
	prefix   string // of the segments' paths, which end in the position where each begins
	limit    int64
	segments []*segment
	end      int64
	file     *os.File // the last segment's; nil where none is being written
}

type segment struct {
	start, end int64
	marks      []mark
}

// mark says that at this second the output had come so far.
type mark struct{ second, position int64 }

func (o *output) path(start int64) string { return o.prefix + "." + strconv.FormatInt(start, 10) }

// loadOutput finds the segments that an agent before this one has left.
func loadOutput(prefix string, limit int64) *output {
	o := &output{prefix: prefix, limit: limit}
	paths, _ := filepath.Glob(prefix + ".*")
	for _, path := range paths {
		start, err := strconv.ParseInt(strings.TrimPrefix(path, prefix+"."), 10, 64)
		info, statErr := os.Lstat(path)
		if err != nil || statErr != nil || start < 0 || !info.Mode().IsRegular() {
			continue
		}
		o.segments = append(o.segments, &segment{start, start + info.Size(), []mark{{info.ModTime().Unix(), start + info.Size()}}})
	}
	sort.Slice(o.segments, func(i, j int) bool { return o.segments[i].start < o.segments[j].start })
	kept := o.segments[:0]
	for _, s := range o.segments {
		if n := len(kept); n > 0 && s.start < kept[n-1].end {
			kept = kept[:0] // nothing that we wrote: the newest counts
		}
		kept = append(kept, s)
	}
	o.segments = kept
	if n := len(o.segments); n > 0 {
		o.end = o.segments[n-1].end
	}
	return o
}

// span returns the positions of what is kept.
func (o *output) span() (start, end int64) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	if len(o.segments) > 0 {
		return o.segments[0].start, o.end
	}
	return o.end, o.end
}

func (o *output) add(data []byte) {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	for len(data) > 0 {
		last, room := o.last()
		step := data
		if int64(len(step)) > room {
			step = step[:room]
		}
		if !o.write(last, step) && !(o.dropOldest() && o.write(last, step)) {
			// A full disk: the process goes on, its readers are told of the gap.
			o.endSegment()
			o.end += int64(len(data))
			return
		}
		data = data[len(step):]
		for len(o.segments) > 1 && o.end-o.segments[0].start > o.limit {
			o.dropOldest()
		}
	}
}

// last returns the segment to write to and how much it takes.
func (o *output) last() (*segment, int64) {
	size := o.limit / parts
	if n := len(o.segments); o.file != nil && n > 0 {
		if room := size - (o.segments[n-1].end - o.segments[n-1].start); room > 0 {
			return o.segments[n-1], room
		}
	}
	o.endSegment()
	s := &segment{start: o.end, end: o.end}
	file, err := os.OpenFile(o.path(o.end), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err == nil {
		o.file = file
		if n := len(o.segments); n > 0 && o.segments[n-1].start == o.end {
			o.segments = o.segments[:n-1] // it was empty
		}
		o.segments = append(o.segments, s)
	}
	return s, size
}

func (o *output) write(s *segment, data []byte) bool {
	if o.file == nil {
		return false
	}
	if _, err := o.file.WriteAt(data, s.end-s.start); err != nil {
		return false
	}
	s.end += int64(len(data))
	o.end = s.end
	now := time.Now().Unix()
	if n := len(s.marks); n > 0 && s.marks[n-1].second == now {
		s.marks[n-1].position = o.end
		return true
	}
	if len(s.marks) >= maxMarks {
		kept := s.marks[:0]
		for i := 1; i < len(s.marks); i += 2 {
			kept = append(kept, s.marks[i])
		}
		s.marks = kept
	}
	s.marks = append(s.marks, mark{now, o.end})
	return true
}

func (o *output) endSegment() {
	if o.file != nil {
		o.file.Close()
		o.file = nil
	}
}

// dropOldest removes the oldest segment that is not being written; false when there is none.
func (o *output) dropOldest() bool {
	if len(o.segments) == 0 || (len(o.segments) == 1 && o.file != nil) {
		return false
	}
	os.Remove(o.path(o.segments[0].start))
	o.segments = o.segments[1:]
	return true
}

// at returns the position that the output had come to before a second.
func (o *output) at(second int64) int64 {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	position := int64(-1)
	for _, s := range o.segments {
		if position < 0 {
			position = s.start
		}
		for _, m := range s.marks {
			if m.second >= second {
				return position
			}
			position = m.position
		}
	}
	return o.end
}

// reader reads an output from a position on, whatever happens to its segments meanwhile.
type reader struct {
	of       *output
	position int64
	file     *os.File
	start    int64 // of the open segment
}

func (r *reader) close() {
	if r.file != nil {
		r.file.Close()
		r.file = nil
	}
}

// read reads what is there before the position `until`; missed counts what stood before it and is kept no more.
func (r *reader) read(buffer []byte, until int64) (count int, missed int64, err error) {
	for try := 0; try < 100; try++ {
		r.of.mutex.Lock()
		var found *segment
		for _, s := range r.of.segments {
			if s.end > r.position {
				found = s
				break
			}
		}
		start, end := r.of.end, r.of.end
		if found != nil {
			start, end = found.start, found.end
		}
		r.of.mutex.Unlock()
		if r.position < start {
			missed += start - r.position
			r.position = start
		}
		if end > until {
			end = until
		}
		if found == nil || r.position >= end {
			return 0, missed, nil
		}
		if r.file == nil || r.start != start {
			r.close()
			fd, err := syscall.Open(r.of.path(start), syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
			if err == syscall.ENOENT {
				continue // dropped just now
			}
			if err != nil {
				return 0, missed, fmt.Errorf("read the session's output: %w", err)
			}
			r.file, r.start = os.NewFile(uintptr(fd), "output"), start
		}
		if int64(len(buffer)) > end-r.position {
			buffer = buffer[:end-r.position]
		}
		count, err = r.file.ReadAt(buffer, r.position-start)
		r.position += int64(count)
		if count > 0 {
			err = nil
		}
		return count, missed, err
	}
	return 0, missed, fmt.Errorf("the session's output is not where it was written")
}
