package exec

import (
	"encoding/base64"
	"io"
	"strings"

	"banger/agent/stream"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// TTY is the pty asked for.
type TTY struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
	Term string `json:"term"`
}

// Request is a parsed exec request: bytes are bytes again.
type Request struct {
	Argv     []string
	Env      map[string]string
	ExactEnv bool
	Cwd      string
	User     string
	TTY      *TTY
	Stdin    bool
	Detach   bool
	TimeoutS float64
	// Within moves the agent to where the child has to begin (a cgroup), for the time of its fork.
	Within func() (leave func())
}

type wireRequest struct {
	Argv     []string          `json:"argv"`
	Env      map[string]string `json:"env"`
	EnvMode  string            `json:"env_mode"`
	Cwd      *string           `json:"cwd"`
	User     string            `json:"user"`
	TTY      *TTY              `json:"tty"`
	Stdin    string            `json:"stdin"`
	Detach   bool              `json:"detach"`
	TimeoutS *float64          `json:"timeout_s"`
}

// ParseRequest checks an exec request.
func ParseRequest(raw []byte) (*Request, error) {
	var wire wireRequest
	if err := stream.Decode(raw, &wire); err != nil {
		return nil, err
	}
	if len(wire.Argv) == 0 {
		return nil, stream.Failed("bad_request", "argv is empty")
	}
	request := &Request{Env: map[string]string{}, User: wire.User, TTY: wire.TTY, Detach: wire.Detach}
	for _, item := range wire.Argv {
		value, err := FromBase64(item)
		if err != nil {
			return nil, err
		}
		request.Argv = append(request.Argv, value)
	}
	for key, item := range wire.Env {
		name, err := FromBase64(key)
		if err != nil {
			return nil, err
		}
		value, err := FromBase64(item)
		if err != nil {
			return nil, err
		}
		if name == "" || strings.Contains(name, "=") {
			return nil, stream.Failed("bad_request", "environment name %q", name)
		}
		request.Env[name] = value
	}
	if wire.Cwd != nil {
		cwd, err := FromBase64(*wire.Cwd)
		if err != nil {
			return nil, err
		}
		request.Cwd = cwd
	}
	switch wire.EnvMode {
	case "", "add":
	case "exact":
		request.ExactEnv = true
	default:
		return nil, stream.Failed("bad_request", "env_mode %q", wire.EnvMode)
	}
	switch wire.Stdin {
	case "pipe":
		request.Stdin = !wire.Detach
	case "", "null":
	default:
		return nil, stream.Failed("bad_request", "stdin %q", wire.Stdin)
	}
	if request.Detach && request.TTY != nil {
		return nil, stream.Failed("bad_request", "a detached exec has no tty")
	}
	if wire.TimeoutS != nil {
		if *wire.TimeoutS <= 0 || *wire.TimeoutS > 1e9 {
			return nil, stream.Failed("bad_request", "timeout_s %v", *wire.TimeoutS)
		}
		request.TimeoutS = *wire.TimeoutS
	}
	return request, nil
}

// FromBase64 returns the bytes of a member that need not be UTF-8.
func FromBase64(text string) (string, error) {
	value, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return "", stream.Failed("bad_request", "bad base64: %v", err)
	}
	for _, c := range value {
		if c == 0 {
			return "", stream.Failed("bad_request", "a NUL byte in argv, env or cwd")
		}
	}
	return string(value), nil
}

// ImageEnvironment is what the image says its processes get.
var ImageEnvironment map[string]string

// environment returns NAME=VALUE strings for a process of the account.
func environment(request *Request, account *Account, etc string) []string {
	values := map[string]string{}
	if !request.ExactEnv {
		values["PATH"] = defaultPath
		values["HOME"] = account.Home
		values["USER"] = account.Name
		values["LOGNAME"] = account.Name
		values["SHELL"] = account.Shell
		values["LANG"] = "C.UTF-8"
		for name, value := range etcEnvironment(etc + "/environment") {
			values[name] = value
		}
		for name, value := range ImageEnvironment {
			if name != "" && !strings.ContainsAny(name, "=\x00") && strings.IndexByte(value, 0) < 0 {
				values[name] = value
			}
		}
		if request.TTY != nil {
			values["TERM"] = request.TTY.Term
			if values["TERM"] == "" {
				values["TERM"] = "xterm"
			}
		}
	}
	for name, value := range request.Env {
		values[name] = value
	}
	list := make([]string, 0, len(values))
	for name, value := range values {
		list = append(list, name+"="+value)
	}
	return list
}

// SearchPath returns the PATH that a process of the account gets when nothing else is asked for.
func SearchPath(account *Account) string {
	for _, entry := range environment(&Request{}, account, Etc) {
		if strings.HasPrefix(entry, "PATH=") {
			return entry[len("PATH="):]
		}
	}
	return defaultPath
}

// etcEnvironment reads NAME=VALUE lines as pam_env does: comments, `export `, quotes around the value.
func etcEnvironment(path string) map[string]string {
	values := map[string]string{}
	file := openPlain(path)
	if file == nil {
		return values
	}
	defer file.Close()
	const limit = 1 << 20
	raw, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil || len(raw) > limit {
		return values
	}
	for _, line := range strings.Split(string(raw), "\n") {
		line = strings.TrimSpace(line)
		line = strings.TrimSpace(strings.TrimPrefix(line, "export "))
		i := strings.IndexByte(line, '=')
		if i <= 0 || line[0] == '#' || strings.IndexByte(line, 0) >= 0 {
			continue
		}
		name, value := line[:i], line[i+1:]
		if len(value) >= 2 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		values[name] = value
	}
	return values
}
