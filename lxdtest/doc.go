// Package lxdtest is a fake LXD server for tests, in the spirit of net/http/httptest.
//
//	s := lxdtest.NewServer()
//	defer s.Close()
//	s.AddInstance(lxdtest.Instance{Name: "c1", Handler: lxdtest.LocalCommands("")})
//	server, err := lxd.ConnectLXDUnix(s.Socket, nil)
//
// What a client meets is LXD's wire: the REST API of instances, exec, files and
// operations, the WebSockets of a command with their frames, sizes and abrupt ends, events, and
// SFTP behind an upgrade. The official Go client, the lxc command and package
// transport connect to it as to a real daemon. A [Version] says which release is acted; the differences
// were taken from running servers, and a differential test holds the default one against a real LXD, and those of Incus against a real Incus.
//
// Commands are handlers, func(*[Process]) int; [LocalCommands] is one that runs real
// commands of the machine. A [Fault] makes something go wrong: at a kind of request or socket, at a moment of
// it, an action. What the server was asked is read back with [Server.Execs], [Server.Requests] and
// [Server.Files]. [HostileTar] and [HostileSFTP] are a host's tar and its SFTP server that send what
// no honest ones would.
//
// # What is not there
//
// Clusters, storage, networks, profiles, images beyond their names, owners of the files of a copied instance, snapshots, migration, trust tokens, OIDC.
// Nothing is confined: a real command sees the whole machine, and what it leaves behind in the background outlives its instance. Terminals are real ones on Linux, and
// elsewhere pipes without echo. A stopped process (SIGSTOP) and a frozen one go on running when they are
// handlers; a real command is stopped with its instance, but not what it has started. A client that does not
// read for two minutes is cut off on Linux only. A GET of a FIFO does not keep its instance from being stopped.
package lxdtest
