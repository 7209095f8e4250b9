package boot

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"banger/agent/sys"
	"banger/agent/system"
)

const (
	driveWait  = 30 * time.Second
	readyWait  = 2 * time.Second
	readyFD    = 3
	clockSlack = 2 * time.Second
	newRoot    = "/newroot"
	maxDuties  = 8 << 20

	noSuidDevExec = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
)

// AgentArgument makes the binary the long-lived agent; argv[0] begins with `@` so that systemd spares it at
// shutdown (https://systemd.io/ROOT_STORAGE_DAEMONS/).
const AgentArgument = "@banger-agent"

var inits = []string{"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init", "/bin/init"}

// notInits are programs that images have as /sbin/init though they end when what they were given to run ends, and
// they would be given nothing: a PID 1 that ends is a panic.
var notInits = map[string]bool{
	"tini": true, "tini-static": true, "dumb-init": true, "catatonit": true, "docker-init": true,
	"sh": true, "bash": true, "dash": true, "true": true, "false": true, "sleep": true,
}

// Main is PID 1 in the initramfs. It does not return.
func Main() {
	step, err := run()
	fail(step, err)
}

// fail tells the console why the boot ended, and ends the machine: the host finds the line in its log.
func fail(step string, err error) {
	line := fmt.Sprintf("banger-agent: boot: %s: %v", step, err)
	line = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\r' {
			return ' '
		}
		return r
	}, line)
	if console, openErr := os.OpenFile("/dev/console", os.O_WRONLY|syscall.O_NOCTTY, 0); openErr == nil {
		fmt.Fprintf(console, "\n%s\n", line)
		const tcsbrk = 0x5409 // with 1: wait until all of it is sent
		_ = sys.Ioctl(int(console.Fd()), tcsbrk, 1)
	} else {
		Log("%s", line)
	}
	system.Reboot(true)
	for { // PID 1 must not return
		time.Sleep(time.Hour)
	}
}

// Log writes one line to the kernel's log.
func Log(format string, arguments ...interface{}) {
	if kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		fmt.Fprintf(kmsg, "<6>banger-agent: "+format+"\n", arguments...)
		kmsg.Close()
	}
}

// marks is the time line of this boot, for the kernel's log.
var marks string

func mark(name string) { marks += fmt.Sprintf(" %s %.0f", name, system.Uptime()*1000) }

func run() (step string, err error) {
	step = "mount /proc, /sys, /dev"
	for _, m := range []struct {
		target, fstype string
		flags          uintptr
		data           string
	}{
		{"/proc", "proc", noSuidDevExec, ""},
		{"/sys", "sysfs", noSuidDevExec, ""},
		{"/dev", "devtmpfs", syscall.MS_NOSUID, "mode=0755"},
	} {
		_ = os.Mkdir(m.target, 0o755)
		// EBUSY: CONFIG_DEVTMPFS_MOUNT does not cover an initramfs, but a second mount is no failure.
		if err := syscall.Mount(m.fstype, m.target, m.fstype, m.flags, m.data); err != nil && err != syscall.EBUSY {
			return step, fmt.Errorf("%s: %w", m.target, err)
		}
	}
	step = "read boot.json"
	config, err := readConfig()
	if err != nil {
		return step, err
	}
	mark("start")
	// Beside the mounts: those wait for their drive, which is there once its module is.
	modules := make(chan error, 1)
	go func() { modules <- loadModules() }()
	step = "set the clock"
	if config.TimeUnixNs > 0 && time.Now().Add(clockSlack).UnixNano() < config.TimeUnixNs {
		if err := system.SetClock(config.TimeUnixNs); err != nil {
			return step, err
		}
	}
	step = "mount the disks"
	diskErr := mountDisks(config)
	mark("disks")
	if err := <-modules; err != nil {
		return "load kernel modules", err
	}
	mark("modules")
	if diskErr != nil {
		return step, diskErr
	}
	if config.Export != nil {
		return export(config)
	}
	step = "join the disks"
	if err := mountOverlay(); err != nil {
		return step, err
	}
	inRoot, err := openRoot(newRoot)
	if err != nil {
		return step, err
	}
	step = "set up the new root"
	if err := prepareRoot(inRoot, config); err != nil {
		return step, err
	}
	mark("root")
	step = "configure the network"
	if err := configureLoopback(); err != nil {
		return step, fmt.Errorf("lo: %w", err)
	}
	duties := &Duties{Network: config.Network, Environment: config.Environment, Once: config.Once}
	if duties.Network != nil {
		done, err := configureNetwork(duties.Network)
		if err != nil {
			return step, err
		}
		if done {
			duties.Network = nil
		}
	}
	step = "find the image's init"
	argv, err := findInit(inRoot, config.Init)
	if err != nil {
		return step, err
	}
	step = "enter the new root"
	if err := enterRoot(inRoot); err != nil {
		return step, err
	}
	mark("network")
	step = "start the agent"
	pid, err := startAgent(argv == nil, duties)
	if err != nil {
		return step, err
	}
	mark("agent")
	Log("boot: ms since boot:%s", marks)
	if argv != nil {
		step = "start " + argv[0]
		environment := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "TERM=linux"}
		err := syscall.Exec(argv[0], argv, environment)
		if len(config.Init) > 0 {
			return step, err
		}
		Log("boot: %s does not start (%v): the agent stays PID 1", argv[0], err)
	}
	step = "be init"
	if err := syscall.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", noSuidDevExec, "nsdelegate"); err != nil {
		Log("boot: cgroup2: %v", err) // a kernel without it still runs programs
	}
	return step, beInit(pid, duties)
}

func loadModules() error {
	raw, err := os.ReadFile("/banger/modules.list")
	if os.IsNotExist(err) {
		return nil // all of them are built in
	}
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(raw)) {
		name = strings.TrimSuffix(name, ".ko")
		file, err := os.Open("/banger/modules/" + filepath.Base(name) + ".ko")
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		err = sys.FinitModule(int(file.Fd()), "")
		file.Close()
		switch err {
		case nil, syscall.EEXIST, syscall.ENODEV: // ENODEV: its device is not there, say AF_VSOCK's
		default:
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// findDrive resolves a path or `serial:<serial>` to a device.
func findDrive(spec string) string {
	if !strings.HasPrefix(spec, "serial:") {
		if _, err := os.Stat(spec); err == nil {
			return spec
		}
		return ""
	}
	files, _ := filepath.Glob("/sys/block/*/serial")
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(strings.TrimRight(string(raw), "\x00")) == spec[len("serial:"):] {
			device := "/dev/" + filepath.Base(filepath.Dir(file))
			if _, err := os.Stat(device); err == nil {
				return device
			}
		}
	}
	return ""
}

func waitForDrive(spec string) (string, error) {
	for deadline := time.Now().Add(driveWait); ; time.Sleep(5 * time.Millisecond) {
		if device := findDrive(spec); device != "" {
			return device, nil
		}
		if time.Now().After(deadline) {
			names, _ := filepath.Glob("/sys/block/*")
			return "", fmt.Errorf("no drive %s within %s (there are: %s)", spec, driveWait, strings.Join(names, " "))
		}
	}
}

func mountDisks(config *Config) error {
	mount := func(spec, target string, flags uintptr) error {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		device, err := waitForDrive(spec)
		if err != nil {
			return err
		}
		for deadline := time.Now().Add(driveWait); ; time.Sleep(5 * time.Millisecond) {
			err := syscall.Mount(device, target, "ext4", flags, "")
			if err == nil {
				return nil
			}
			// A disk has its node a moment before it can be opened; on a host that emulates an emulator over a second.
			if err != syscall.ENXIO && err != syscall.ENODEV && err != syscall.ENOENT || time.Now().After(deadline) {
				return fmt.Errorf("%s (%s) on %s: %w", device, spec, target, err)
			}
		}
	}
	// Side by side: an emulated disk takes its time over each.
	results := make(chan error, 3)
	go func() { results <- mount(config.Drives.Base, "/base", syscall.MS_RDONLY) }()
	ownFlags := uintptr(syscall.MS_NOATIME)
	if config.Export != nil {
		ownFlags = syscall.MS_RDONLY
	}
	go func() { results <- mount(config.Drives.Own, "/own", ownFlags) }()
	go func() {
		if config.Drives.Modules == nil {
			results <- nil
			return
		}
		results <- mount(*config.Drives.Modules, "/modules", syscall.MS_RDONLY)
	}()
	var first error
	for i := 0; i < cap(results); i++ {
		if err := <-results; err != nil && first == nil {
			first = err
		}
	}
	return first
}

func mountOverlay() error {
	for _, name := range []string{"/own/upper", "/own/work", "/own/docker", "/own/containerd"} {
		if err := os.Mkdir(name, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
	}
	if err := growOwn("/own"); err != nil {
		Log("boot: the disk was not grown: %v", err) // it works on as it is
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	if err := syscall.Mount("overlay", newRoot, "overlay", 0, "lowerdir=/base,upperdir=/own/upper,workdir=/own/work"); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	return nil
}

// prepareRoot mounts what every root has and writes what the host decided. Nothing here trusts the image: every path
// is resolved inside it. What an odd image (a file where /root should be, a full disk) makes impossible is logged and
// left out: a machine one can enter is worth more than none.
func prepareRoot(r *root, config *Config) error {
	try := func(err error) {
		if err != nil {
			Log("boot: left out: %v", err)
		}
	}
	// Docker's and containerd's overlayfs cannot lie on ours: they get the ext4 itself.
	for source, target := range map[string]string{"/own/docker": "/var/lib/docker", "/own/containerd": "/var/lib/containerd"} {
		try(r.mount(source, target, "", syscall.MS_BIND, ""))
	}
	if config.Drives.Modules != nil {
		raw, err := os.ReadFile("/proc/sys/kernel/osrelease")
		if err != nil {
			return err
		}
		target := "/lib/modules/" + strings.TrimSpace(string(raw))
		try(r.mount("/modules", target, "", syscall.MS_MOVE, ""))
	}
	try(r.mount("tmpfs", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=0755"))
	for _, name := range []string{"/dev/pts", "/dev/shm"} {
		_ = os.Mkdir(name, 0o755)
	}
	if err := syscall.Mount("devpts", "/dev/pts", "devpts", syscall.MS_NOSUID|syscall.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"); err != nil {
		return fmt.Errorf("/dev/pts: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/dev/shm", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("/dev/shm: %w", err)
	}
	for source, name := range map[string]string{
		"/proc/self/fd": "/dev/fd", "/proc/self/fd/0": "/dev/stdin", "/proc/self/fd/1": "/dev/stdout", "/proc/self/fd/2": "/dev/stderr",
	} {
		_ = os.Symlink(source, name) // an init makes them too; with none the agent stays PID 1
	}
	if config.Hostname != "" {
		if err := syscall.Sethostname([]byte(config.Hostname)); err != nil {
			return fmt.Errorf("hostname: %w", err)
		}
	}
	// Images for containers lack what their runtime makes.
	if !r.exists("/tmp") {
		try(r.makeDirectory(&Directory{Path: "/tmp", Mode: 0o1777}))
	}
	try(r.symlinkIfAbsent("../proc/self/mounts", "/etc/mtab"))
	for i := range config.Directories {
		try(r.makeDirectory(&config.Directories[i]))
	}
	for i := range config.Files {
		try(r.writeFile(&config.Files[i]))
	}
	// Debian's tmpfiles.d says `D /tmp`: systemd-tmpfiles would empty /tmp during the boot, under a command that
	// the agent already runs. A file of this name in /run comes before the one in /usr/lib.
	try(r.writeFile(&File{Path: "/run/tmpfiles.d/tmp.conf", Mode: 0o644, Content: []byte("q /tmp 1777 root root 10d\n")}))
	return nil
}

// findInit returns the argv of the image's init, nil when it has none.
func findInit(r *root, override []string) ([]string, error) {
	if len(override) > 0 {
		if !r.isExecutable(override[0]) {
			return nil, fmt.Errorf("%s is not an executable file of the image", override[0])
		}
		return override, nil
	}
	for _, name := range inits {
		if r.isInit(name) {
			return []string{name}, nil
		}
	}
	return nil, nil
}

// enterRoot makes the new root `/`, as switch_root(8) does, and frees what the initramfs holds.
func enterRoot(r *root) error {
	// boot.json holds private keys, the modules some MiB. The agent's own file lives on as long as it runs.
	_ = os.RemoveAll("/banger")
	_ = os.Remove("/init")
	for _, name := range []string{"/dev", "/sys", "/proc"} {
		if err := r.mount(name, name, "", syscall.MS_MOVE, ""); err != nil {
			return err
		}
	}
	syscall.Close(r.fd)
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := syscall.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// startAgent starts the long-lived agent, tells it its duties and waits until it serves its ports.
func startAgent(isInit bool, duties *Duties) (int, error) {
	var ready, stdin [2]int
	if err := syscall.Pipe2(ready[:], syscall.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer syscall.Close(ready[0])
	if err := syscall.Pipe2(stdin[:], syscall.O_CLOEXEC); err != nil {
		return 0, err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	mode := "beside"
	if isInit {
		mode = "init"
	}
	told, err := json.Marshal(duties)
	if err != nil {
		return 0, err
	}
	write := os.NewFile(uintptr(ready[1]), "ready")
	read, tell := os.NewFile(uintptr(stdin[0]), "duties"), os.NewFile(uintptr(stdin[1]), "duties")
	// The link resolves to our file though it has no name in the new root any more.
	process, err := os.StartProcess("/proc/self/exe", []string{AgentArgument, mode}, &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "GOTRACEBACK=single"},
		Files: []*os.File{read, null, null, write},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	write.Close()
	read.Close()
	if err != nil {
		tell.Close()
		return 0, err
	}
	// It reads to the end before it says that it is ready. Should it die, the write fails.
	_, _ = tell.Write(told)
	tell.Close()
	if err := syscall.SetNonblock(ready[0], true); err != nil {
		return 0, err
	}
	for deadline := time.Now().Add(readyWait); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		var one [1]byte
		n, err := syscall.Read(ready[0], one[:])
		if n == 1 {
			break
		}
		if n == 0 && err == nil {
			return 0, fmt.Errorf("it died")
		}
	}
	return process.Pid, nil
}

// ReadDuties is the agent's side of it; nobody else reads its standard input.
func ReadDuties() (*Duties, error) {
	duties := &Duties{}
	err := json.NewDecoder(io.LimitReader(os.Stdin, maxDuties)).Decode(duties)
	if null, nullErr := syscall.Open("/dev/null", syscall.O_RDWR|syscall.O_CLOEXEC, 0); nullErr == nil {
		_ = syscall.Dup3(null, 0, 0)
		syscall.Close(null)
	}
	return duties, err
}

// TellReady is the agent's answer to startAgent.
func TellReady() {
	_, _ = syscall.Write(readyFD, []byte{1})
	syscall.Close(readyFD)
}

// beInit reaps, and starts the agent again should it ever die.
func beInit(agent int, duties *Duties) error {
	again := *duties
	again.Once = nil
	for deaths := 0; ; {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil && err != syscall.ECHILD {
			return err
		}
		if pid == agent || err == syscall.ECHILD {
			deaths++
			if deaths > 5 {
				return fmt.Errorf("the agent died %d times", deaths)
			}
			Log("the agent died (status %d), starting it again", status)
			if agent, err = startAgent(true, &again); err != nil {
				return err
			}
		}
	}
}
