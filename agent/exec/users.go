package exec

import (
	"bufio"
	"os"
	"strconv"
	"strings"
	"syscall"

	"banger/agent/stream"
)

// Account is who a process runs as.
type Account struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32
	Home   string
	Shell  string
}

// LookUp resolves `name|uid[:group|gid]` in the passwd and group files below etc.
func LookUp(spec, etc string) (*Account, error) {
	user, group := spec, ""
	if i := strings.IndexByte(spec, ':'); i >= 0 {
		user, group = spec[:i], spec[i+1:]
		if group == "" {
			return nil, stream.Failed("no_user", "user %q has an empty group", spec)
		}
	}
	if user == "" {
		user = "root"
	}
	account := &Account{Name: user, Home: "/", Shell: "/bin/sh"}
	found := false
	number, numberErr := strconv.ParseUint(user, 10, 32)
	eachLine(etc+"/passwd", func(fields []string) bool {
		if len(fields) < 7 {
			return true
		}
		uid, err := strconv.ParseUint(fields[2], 10, 32)
		gid, gidErr := strconv.ParseUint(fields[3], 10, 32)
		if err != nil || gidErr != nil {
			return true
		}
		if fields[0] != user && (numberErr != nil || uid != number) {
			return true
		}
		account.Name, account.UID, account.GID = fields[0], uint32(uid), uint32(gid)
		if fields[5] != "" {
			account.Home = fields[5]
		}
		if fields[6] != "" {
			account.Shell = fields[6]
		}
		found = true
		return false
	})
	if !found {
		switch {
		case numberErr == nil:
			account.UID, account.GID = uint32(number), uint32(number)
			if group == "" && number != 0 {
				account.GID = 0 // as container runtimes do for a uid that nobody has
			}
			if number == 0 {
				account.Home = "/root"
			}
		case user == "root":
			account.Home = "/root" // an image without /etc/passwd
		default:
			return nil, stream.Failed("no_user", "the guest has no user %q in /etc/passwd (a number needs no entry)", user)
		}
	}
	account.Groups = []uint32{}
	groupNumber, groupErr := strconv.ParseUint(group, 10, 32)
	groupFound := group == ""
	eachLine(etc+"/group", func(fields []string) bool {
		if len(fields) < 4 {
			return true
		}
		gid, err := strconv.ParseUint(fields[2], 10, 32)
		if err != nil {
			return true
		}
		if group != "" && fields[0] == group {
			account.GID, groupFound = uint32(gid), true
		}
		if found {
			for _, member := range strings.Split(fields[3], ",") {
				if member == account.Name {
					account.Groups = append(account.Groups, uint32(gid))
				}
			}
		}
		return true
	})
	if !groupFound {
		if groupErr != nil {
			return nil, stream.Failed("no_user", "the guest has no group %q in /etc/group (a number needs no entry)", group)
		}
		account.GID = uint32(groupNumber)
	}
	return account, nil
}

// openPlain opens a regular file; nil for anything else, such as a FIFO on which an open would wait for ever.
func openPlain(path string) *os.File {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	file := os.NewFile(uintptr(fd), path)
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		file.Close()
		return nil
	}
	return file
}

// eachLine calls line with the colon-separated fields of each line until it returns false.
func eachLine(path string, line func([]string) bool) {
	file := openPlain(path)
	if file == nil {
		return
	}
	defer file.Close()
	scanner := bufio.NewScanner(file)
	scanner.Buffer(nil, 1<<20) // a group may have thousands of members
	for scanner.Scan() {
		if !line(strings.Split(scanner.Text(), ":")) {
			return
		}
	}
}
