package boot

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const interfaceWait = 10 * time.Second

func parseAddress(cidr string) (net.IP, int, error) {
	ip, network, err := net.ParseCIDR(cidr)
	if err != nil {
		return nil, 0, err
	}
	ones, bits := network.Mask.Size()
	if bits != 32 {
		return nil, 0, fmt.Errorf("%s is not IPv4", cidr)
	}
	return ip.To4(), ones, nil
}

// netlink is a route socket; every request waits for its acknowledgement.
type netlink struct {
	fd       int
	sequence uint32
}

func openNetlink() (*netlink, error) {
	fd, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := syscall.Bind(fd, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	return &netlink{fd: fd}, nil
}

// order is that of both our machines.
var order = binary.LittleEndian

func attribute(kind uint16, value []byte) []byte {
	raw := make([]byte, 4, 8+len(value))
	order.PutUint16(raw, uint16(4+len(value)))
	order.PutUint16(raw[2:], kind)
	raw = append(raw, value...)
	for len(raw)%4 != 0 {
		raw = append(raw, 0)
	}
	return raw
}

func (n *netlink) request(kind, flags uint16, parts ...[]byte) error {
	n.sequence++
	message := make([]byte, 16)
	for _, part := range parts {
		message = append(message, part...)
	}
	order.PutUint32(message, uint32(len(message)))
	order.PutUint16(message[4:], kind)
	order.PutUint16(message[6:], flags|syscall.NLM_F_REQUEST|syscall.NLM_F_ACK)
	order.PutUint32(message[8:], n.sequence)
	if err := syscall.Sendto(n.fd, message, 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 8192)
	for try := 0; try < 100; try++ {
		count, _, err := syscall.Recvfrom(n.fd, answer, 0)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if count < 20 || order.Uint32(answer[8:]) != n.sequence || order.Uint16(answer[4:]) != syscall.NLMSG_ERROR {
			continue
		}
		if errno := -int32(order.Uint32(answer[16:])); errno != 0 {
			return syscall.Errno(errno)
		}
		return nil
	}
	return fmt.Errorf("netlink did not answer")
}

func interfaceIndex(name string) int {
	raw, err := os.ReadFile("/sys/class/net/" + name + "/ifindex")
	if err != nil {
		return 0
	}
	index, _ := strconv.Atoi(strings.TrimSpace(string(raw)))
	return index
}

func (n *netlink) up(index int) error {
	body := make([]byte, 16) // ifinfomsg
	order.PutUint32(body[4:], uint32(index))
	order.PutUint32(body[8:], syscall.IFF_UP)
	order.PutUint32(body[12:], syscall.IFF_UP)
	return n.request(syscall.RTM_NEWLINK, 0, body)
}

func (n *netlink) address(index int, ip net.IP, prefix int) error {
	body := make([]byte, 8) // ifaddrmsg
	body[0], body[1] = syscall.AF_INET, byte(prefix)
	order.PutUint32(body[4:], uint32(index))
	parts := [][]byte{body, attribute(syscall.IFA_LOCAL, ip), attribute(syscall.IFA_ADDRESS, ip)}
	if prefix < 31 {
		broadcast := make([]byte, 4)
		binary.BigEndian.PutUint32(broadcast, binary.BigEndian.Uint32(ip)|(1<<(32-uint(prefix))-1))
		parts = append(parts, attribute(syscall.IFA_BROADCAST, broadcast))
	}
	return n.request(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, parts...)
}

func (n *netlink) defaultRoute(index int, gateway net.IP) error {
	body := make([]byte, 12) // rtmsg
	body[0], body[4], body[5] = syscall.AF_INET, syscall.RT_TABLE_MAIN, syscall.RTPROT_BOOT
	body[6], body[7] = syscall.RT_SCOPE_UNIVERSE, syscall.RTN_UNICAST
	link := make([]byte, 4)
	order.PutUint32(link, uint32(index))
	return n.request(syscall.RTM_NEWROUTE, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, body,
		attribute(syscall.RTA_GATEWAY, gateway), attribute(syscall.RTA_OIF, link))
}

// configureLoopback brings lo up.
func configureLoopback() error {
	n, err := openNetlink()
	if err != nil {
		return err
	}
	defer syscall.Close(n.fd)
	return n.up(interfaceIndex("lo"))
}

// configureNetwork gives the interface its address and route, if it is there.
func configureNetwork(config *Network) (done bool, err error) {
	index := interfaceIndex(config.Interface)
	if index == 0 {
		return false, nil
	}
	n, err := openNetlink()
	if err != nil {
		return false, err
	}
	defer syscall.Close(n.fd)
	ip, prefix, err := parseAddress(config.AddressCIDR)
	if err != nil {
		return false, err
	}
	if err := n.address(index, ip, prefix); err != nil {
		return false, fmt.Errorf("address %s: %w", config.AddressCIDR, err)
	}
	if err := n.up(index); err != nil {
		return false, fmt.Errorf("bring %s up: %w", config.Interface, err)
	}
	if config.Gateway != "" {
		gateway := net.ParseIP(config.Gateway).To4()
		if gateway == nil {
			return false, fmt.Errorf("gateway %q is not IPv4", config.Gateway)
		}
		if err := n.defaultRoute(index, gateway); err != nil {
			return false, fmt.Errorf("route by %s: %w", config.Gateway, err)
		}
	}
	return true, nil
}

// ConfigureLateNetwork waits for an interface that was not there during boot.
func ConfigureLateNetwork(config *Network) error {
	for deadline := time.Now().Add(interfaceWait); ; {
		if done, err := configureNetwork(config); done || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no interface %s within %s", config.Interface, interfaceWait)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
