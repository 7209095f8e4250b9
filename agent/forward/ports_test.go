package forward

import "testing"

func TestParseTable(t *testing.T) {
	tcp := `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1234 1 0 100 0 0 10 0
   1: 0100007F:1F91 0100007F:ABCD 01 00000000:00000000 00:00000000 00000000     0        0 1235 1 0 100 0 0 10 0
  broken`
	got := ParseTable("tcp", tcp)
	if len(got) != 1 || got[0].Address != "127.0.0.1" || got[0].Port != 8080 || got[0].Inode != "1234" {
		t.Errorf("%+v", got)
	}
	tcp6 := "x\n 0: 00000000000000000000000001000000:0016 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 99 1\n"
	got = ParseTable("tcp6", tcp6)
	if len(got) != 1 || got[0].Address != "::1" || got[0].Port != 22 {
		t.Errorf("%+v", got)
	}
}

func FuzzParseTable(f *testing.F) {
	f.Add("tcp", "x\n 0: 0100007F:1F90 00000000:0000 0A 0:0 00:0 0 0 0 99 1\n")
	f.Fuzz(func(t *testing.T, proto, text string) { ParseTable(proto, text) })
}
