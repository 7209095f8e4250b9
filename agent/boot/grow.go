package boot

import (
	"os"
	"syscall"

	"banger/agent/sys"
)

// From linux/fs.h and linux/ext4.h.
const (
	blkGetSize64    = 0x80081272
	ext4IocResizeFS = 0x40086610
)

// growOwn makes a mounted ext4 as large as its device, which the host may have made larger while the VM was
// stopped. The guest does it, because a file system that a guest wrote is no input for the host's tools.
func growOwn(mountPoint string) error {
	directory, err := os.Open(mountPoint)
	if err != nil {
		return err
	}
	defer directory.Close()
	var st syscall.Stat_t
	var fs syscall.Statfs_t
	if err := syscall.Fstat(int(directory.Fd()), &st); err != nil {
		return err
	}
	if err := syscall.Fstatfs(int(directory.Fd()), &fs); err != nil {
		return err
	}
	deviceBytes, err := deviceSize(uint64(st.Dev))
	if err != nil {
		return err
	}
	// statfs leaves the file system's own blocks out (at most some per cent): less than 1/16 more is no growth.
	blocks := deviceBytes / uint64(fs.Bsize)
	if blocks <= fs.Blocks+fs.Blocks/16 {
		return nil
	}
	return sys.IoctlUint64(int(directory.Fd()), ext4IocResizeFS, &blocks)
}

func deviceSize(device uint64) (uint64, error) {
	const node = "/own-device"
	if err := syscall.Mknod(node, syscall.S_IFBLK|0o600, int(device)); err != nil {
		return 0, err
	}
	defer os.Remove(node)
	file, err := os.Open(node)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	var size uint64
	err = sys.IoctlUint64(int(file.Fd()), blkGetSize64, &size)
	return size, err
}
