package forward

import (
	"encoding/hex"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"

	"banger/agent/stream"
)

// Socket is one listening socket.
type Socket struct {
	Proto   string  `json:"proto"`
	Address string  `json:"address"`
	Port    int     `json:"port"`
	PID     *int    `json:"pid"`
	Comm    *string `json:"comm"`
}

// Ports serves a ports request.
func Ports(s *stream.Stream, _ []byte) error {
	sockets := []Socket{}
	var inodes []string
	for _, proto := range []string{"tcp", "tcp6", "udp", "udp6"} {
		raw, err := os.ReadFile("/proc/net/" + proto)
		if err != nil {
			continue
		}
		for _, entry := range ParseTable(proto, string(raw)) {
			sockets = append(sockets, entry.Socket)
			inodes = append(inodes, entry.Inode)
		}
	}
	owners := findOwners(inodes)
	for i := range sockets {
		if pid, ok := owners[inodes[i]]; ok {
			number := pid
			sockets[i].PID = &number
			if raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm"); err == nil {
				comm := strings.TrimSuffix(string(raw), "\n")
				sockets[i].Comm = &comm
			}
		}
	}
	return s.Finish(map[string]interface{}{"ports": sockets})
}

// Entry is a parsed line of /proc/net.
type Entry struct {
	Socket
	Inode string
}

// ParseTable parses /proc/net/{tcp,tcp6,udp,udp6}: TCP sockets that listen, UDP sockets with no peer.
func ParseTable(proto, text string) []Entry {
	wanted := "0A"
	if strings.HasPrefix(proto, "udp") {
		wanted = "07"
	}
	var entries []Entry
	for _, line := range strings.Split(text, "\n") {
		fields := strings.Fields(line)
		if len(fields) < 10 || fields[3] != wanted {
			continue
		}
		i := strings.IndexByte(fields[1], ':')
		if i < 0 {
			continue
		}
		raw, err := hex.DecodeString(fields[1][:i])
		port, portErr := strconv.ParseUint(fields[1][i+1:], 16, 16)
		if err != nil || portErr != nil || len(raw) != 4 && len(raw) != 16 {
			continue
		}
		// Each group of four bytes is in the machine's order, little-endian on both of ours.
		for g := 0; g < len(raw); g += 4 {
			raw[g], raw[g+1], raw[g+2], raw[g+3] = raw[g+3], raw[g+2], raw[g+1], raw[g]
		}
		entries = append(entries, Entry{Socket{Proto: proto, Address: net.IP(raw).String(), Port: int(port)}, fields[9]})
	}
	sort.SliceStable(entries, func(i, j int) bool { return entries[i].Port < entries[j].Port })
	return entries
}

func findOwners(inodes []string) map[string]int {
	wanted := map[string]bool{}
	for _, inode := range inodes {
		wanted["socket:["+inode+"]"] = true
	}
	owners := map[string]int{}
	names, err := os.ReadDir("/proc")
	if err != nil || len(wanted) == 0 {
		return owners
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name.Name())
		if err != nil {
			continue
		}
		directory := "/proc/" + name.Name() + "/fd"
		file, err := os.Open(directory)
		if err != nil {
			continue
		}
		fds, _ := file.Readdirnames(-1)
		file.Close()
		for _, fd := range fds {
			if target, err := os.Readlink(directory + "/" + fd); err == nil && wanted[target] {
				inode := target[len("socket:[") : len(target)-1]
				if _, known := owners[inode]; !known {
					owners[inode] = pid
				}
			}
		}
	}
	return owners
}
