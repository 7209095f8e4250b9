package files

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func archive(t testing.TB, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range headers {
		h := headers[i]
		content := ""
		if h.Typeflag == tar.TypeReg {
			content = "content of " + h.Name
			h.Size = int64(len(content))
		}
		h.Format = tar.FormatGNU
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestRoundTripKeepsNamesModesTimesAndLinks(t *testing.T) {
	when := time.Unix(1500000000, 0)
	long := strings.Repeat("d/", 100) + "long"
	target := filepath.Join(t.TempDir(), "in")
	result, err := Extract(archive(t,
		tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o750, ModTime: when},
		tar.Header{Name: "a/run", Typeflag: tar.TypeReg, Mode: 0o4775, ModTime: when},
		tar.Header{Name: "a/\xff\xfe\n name", Typeflag: tar.TypeReg, Mode: 0o600, ModTime: when},
		tar.Header{Name: "a/sym", Typeflag: tar.TypeSymlink, Linkname: "../../nowhere", ModTime: when},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "a/run"},
		tar.Header{Name: long, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: when},
	), target, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	if result.Files != 6 {
		t.Errorf("%d files", result.Files)
	}
	info, err := os.Lstat(target + "/a/run")
	if err != nil || info.Mode() != 0o775|os.ModeSetuid || !info.ModTime().Equal(when) {
		t.Errorf("a/run: %v %v", info, err)
	}
	if info, err := os.Stat(target + "/a"); err != nil || info.Mode().Perm() != 0o750 || !info.ModTime().Equal(when) {
		t.Errorf("a: %v %v", info, err)
	}
	var x, y syscall.Stat_t
	_ = syscall.Stat(target+"/a/run", &x)
	_ = syscall.Stat(target+"/hard", &y)
	if x.Ino != y.Ino || x.Ino == 0 {
		t.Error("the hard link is another file")
	}
	var out bytes.Buffer
	if _, err := Archive(&out, target, false, func() bool { return false }); err != nil {
		t.Fatal(err)
	}
	again := filepath.Join(t.TempDir(), "again")
	if _, err := Extract(&out, again, true, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a/\xff\xfe\n name", long, "hard"} {
		if raw, err := os.ReadFile(again + "/in/" + name); err != nil || !strings.HasPrefix(string(raw), "content of") {
			t.Errorf("%q: %q %v", name, raw, err)
		}
	}
	if link, _ := os.Readlink(again + "/in/a/sym"); link != "../../nowhere" {
		t.Errorf("symlink to %q", link)
	}
}

func TestAFullArchiveHasAttributesAndDevices(t *testing.T) {
	source := t.TempDir()
	if err := os.WriteFile(source+"/file", []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setxattr(source+"/file", "user.note", []byte("a\x00b\nc"), 0); err != nil {
		t.Skip("no extended attributes here")
	}
	mayMakeDevices := syscall.Mknod(source+"/null", syscall.S_IFCHR|0o666, 1<<8|3) == nil
	for _, full := range []bool{false, true} {
		var out bytes.Buffer
		if _, err := Archive(&out, source+"/.", full, func() bool { return false }); err != nil {
			t.Fatal(err)
		}
		found := map[string]*tar.Header{}
		for reader := tar.NewReader(&out); ; {
			header, err := reader.Next()
			if err != nil {
				break
			}
			found[header.Name] = header
		}
		note := found["./file"].PAXRecords["SCHILY.xattr.user.note"]
		if (note == "a\x00b\nc") != full {
			t.Errorf("full %v: attribute %q", full, note)
		}
		device := found["./null"]
		if (device != nil) != (full && mayMakeDevices) {
			t.Errorf("full %v: device %v", full, device)
		}
		if device != nil && (device.Typeflag != tar.TypeChar || device.Devmajor != 1 || device.Devminor != 3) {
			t.Errorf("%+v", device)
		}
	}
}

func TestExtractNeverLeavesTheTarget(t *testing.T) {
	outside := t.TempDir()
	for name, headers := range map[string][]tar.Header{
		"dot dot":      {{Name: "../x", Typeflag: tar.TypeReg}},
		"dot dot deep": {{Name: "a/../../x", Typeflag: tar.TypeReg}},
		"symlink as a directory": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside},
			{Name: "l/x", Typeflag: tar.TypeReg}},
		"hard link to the outside": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside},
			{Name: "h", Typeflag: tar.TypeLink, Linkname: "l/secret"}},
		"hard link dot dot":   {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}},
		"directory over link": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside}, {Name: "l/", Typeflag: tar.TypeDir, Mode: 0o777}},
	} {
		if _, err := Extract(archive(t, headers...), filepath.Join(t.TempDir(), "in"), true, nil); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	// A file over a symlink replaces the link.
	target := filepath.Join(t.TempDir(), "in")
	if _, err := Extract(archive(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside + "/made"},
		tar.Header{Name: "l", Typeflag: tar.TypeReg, Mode: 0o644}), target, true, nil); err != nil {
		t.Error(err)
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("outside holds %v", names)
	}
	if info, _ := os.Lstat(target + "/l"); !info.Mode().IsRegular() {
		t.Error("the link is still there")
	}
}

func TestCreateRefusesWhatIsNotEmpty(t *testing.T) {
	target := t.TempDir()
	one := tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644}
	if _, err := Extract(archive(t, one), target, true, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Extract(archive(t, one), target, true, nil); err == nil {
		t.Error("create wrote into a directory that is not empty")
	}
	if _, err := Extract(archive(t, one), target, false, nil); err != nil {
		t.Errorf("merge: %v", err)
	}
}

func TestManyDirectoriesDoNotRunOutOfDescriptors(t *testing.T) {
	var headers []tar.Header
	for i := 0; i < 3*cachedFds; i++ {
		headers = append(headers, tar.Header{Name: "d" + strings.Repeat("x", i%7) + "/" + strings.Repeat("y", i%200+1) + "/f", Typeflag: tar.TypeReg, Mode: 0o644})
	}
	if _, err := Extract(archive(t, headers...), t.TempDir(), false, nil); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedStreamIsAnError(t *testing.T) {
	whole := archive(t, tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644}).Bytes()
	for _, raw := range [][]byte{whole[:600-80], []byte(strings.Repeat("garbage!", 200))} {
		if _, err := Extract(bytes.NewReader(raw), t.TempDir(), false, nil); err == nil {
			t.Error("taken")
		}
	}
}

func FuzzExtract(f *testing.F) {
	f.Add(archive(f, tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Mode: 0o644}, tar.Header{Name: "a/l", Typeflag: tar.TypeSymlink, Linkname: "../.."}).Bytes())
	f.Fuzz(func(t *testing.T, raw []byte) {
		if len(raw) > 1<<16 {
			return
		}
		base := t.TempDir()
		_, _ = Extract(bytes.NewReader(raw), base+"/in", false, nil)
		if names, _ := os.ReadDir(base); len(names) != 1 {
			t.Fatalf("beside the target: %v", names)
		}
	})
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	found := []string{}
	for _, entry := range entries {
		found = append(found, entry.Name())
	}
	return strings.Join(found, " ")
}

func TestWhoReadsWhileAFileIsReplacedFindsOneOfThem(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("content of f"), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := 0; i < 300; i++ {
			headers := tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o640}
			if _, err := Extract(archive(t, headers), dir, false, nil); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for {
		raw, err := os.ReadFile(file)
		if err != nil || string(raw) != "content of f" {
			t.Fatalf("%q %v", raw, err)
		}
		select {
		case <-done:
			if info, err := os.Stat(file); err != nil || info.Mode() != 0o640 || names(t, dir) != "f" {
				t.Errorf("%v %v, %s", info, err, names(t, dir))
			}
			return
		default:
		}
	}
}

func TestAReplacementThatIsCutOffCostsNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	whole := archive(t, tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644}).Bytes()
	if _, err := Extract(bytes.NewReader(whole[:515]), dir, false, nil); err == nil {
		t.Fatal("a cut stream was taken")
	}
	if raw, _ := os.ReadFile(filepath.Join(dir, "f")); string(raw) != "before" || names(t, dir) != "f" {
		t.Errorf("%q, %s", raw, names(t, dir))
	}
}

func TestReplacingWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	first := archive(t,
		tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "a"},
		tar.Header{Name: "sym", Typeflag: tar.TypeSymlink, Linkname: "a"},
		tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600},
		tar.Header{Name: "empty", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "full/x", Typeflag: tar.TypeReg, Mode: 0o644},
	).Bytes()
	for turn := 0; turn < 2; turn++ {
		if _, err := Extract(bytes.NewReader(first), dir, false, nil); err != nil {
			t.Fatal(err)
		}
		if found := names(t, dir); found != "a empty full hard pipe sym" {
			t.Fatal(found)
		}
	}
	second := archive(t,
		tar.Header{Name: "empty", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "sym", Typeflag: tar.TypeReg, Mode: 0o644},
		tar.Header{Name: "pipe", Typeflag: tar.TypeSymlink, Linkname: "elsewhere"},
	)
	if _, err := Extract(second, dir, false, nil); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"empty", "sym"} {
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || !info.Mode().IsRegular() {
			t.Errorf("%s: %v %v", name, info, err)
		}
	}
	if raw, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(raw) != "content of a" {
		t.Errorf("through the symlink: %q %v", raw, err)
	}
	over := archive(t, tar.Header{Name: "full", Typeflag: tar.TypeReg, Mode: 0o644})
	if _, err := Extract(over, dir, false, nil); err == nil {
		t.Error("a directory with files in it was replaced")
	}
	if found := names(t, dir); found != "a empty full hard pipe sym" {
		t.Error(found)
	}
}
