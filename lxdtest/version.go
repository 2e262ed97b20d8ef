package lxdtest

import (
	_ "embed"
	"slices"
	"strings"
	"time"
)

// A Version is what sets one server release apart from the others, as data. The
// values of this package were taken from running servers; copy one and change a
// field to get a server that nobody has, or one that is quicker to test against:
//
//	s := lxdtest.NewUnstartedServer()
//	s.Version = lxdtest.LXD6
//	s.Version.ConnectWindow = 50 * time.Millisecond
type Version struct {
	Name       string   // for people: "LXD 5.0.2"
	Server     string   // environment.server: "lxd" or "incus"
	Release    string   // environment.server_version
	Extensions []string // api_extensions

	// Times. Tests shorten them; zero stands for "never" or "at once".
	ConnectWindow     time.Duration // from the creation of an exec to its last needed socket
	StartDelay        time.Duration // from the last needed socket to the start of the command
	PingInterval      time.Duration // between two pings on one socket; 0: no pings
	OperationLifetime time.Duration // a finished operation is gone after this
	StallTimeout      time.Duration // a client over TCP that does not take what a socket sends is cut off after this, on Linux; 0: never
	ChildGrace        time.Duration // how long a background child may hold the output open; 0: as long as it likes

	// Sockets.
	PingPayload  string // of each ping
	PingOnUnix   bool   // unix sockets get pings, too
	MessageMax   int    // bytes of output in one message, at most
	ControlMax   int64  // bytes in one control message before the connection is cut; 0: no limit
	StdinWhole   bool   // a message on stdin is read to its end before the process gets any of it
	ReadsStderr  bool   // what a client sends on the stderr socket is read (and thrown away)
	CheckOrigin  bool   // a foreign Origin header is refused with 403
	DuplicateBug bool   // a second connection to one secret blocks the exec for ever
	InputHangsUp bool   // the end of a terminal's input, however it comes, hangs the terminal up with the next output, which is lost

	// Answers.
	Wait            WaitStyle
	BadSecret       Refusal // a secret that no socket has
	MissingSecret   string  // text of the 400 for an unknown operation without a secret
	RequestorCheck  string  // text of the 403 for another client than the creator; "": anybody may connect
	FinishedOwnCode bool    // a dial of a finished operation: 400, or the failed operation's own error
	Delete          DeleteStyle
	HideSecrets     bool // fds are shown in the answer to the POST only
	ErrCode         bool // operations have err_code
	Requestor       bool // operations have requestor
	EntityURL       bool // operations have metadata.entity_url, and that of an exec no resources
	UUIDv7          bool // operation ids are sorted by time
	OldResources    bool // resources.containers names /1.0/containers/…
	NoContainers    bool // resources has instances only, but that of an exec without sockets
	EmptyMetadata   bool // an operation that has none says {}, not null
	EventDetails    bool // lifecycle events have requestor, name and project
	CancelUntilEnd  bool // operations that have ended say that they may not be cancelled
	OneLineErrors   bool // errors end with one line break, not two
	BadEventType    int  // status of the refusal of a type of events that does not exist
	StrictPaths     bool // an address with an empty part does not exist; otherwise clients are sent to the one without
	EarlyDuplicate  bool // the name of an instance that exists is refused; otherwise the operation fails
	CopyProfiles    bool // a copy that names no profiles has those of its source; otherwise it has none, and no disk
	LateAlias       bool // an alias of an image that does not exist makes the operation fail, not the request
	ContainersAlias bool // /1.0/containers and /1.0/virtual-machines exist

	// Exec.
	StrictRecording bool   // record-output with a websocket or a terminal is refused
	ExecOutputDir   bool   // recorded output is below logs/exec-output/
	FailedStatus    bool   // 126 and 127 make the operation fail
	Executable      string // of the server, which starts commands
	VMLost          int    // return of an exec whose virtual machine went away

	// Files.
	HeaderPrefix    string // of X-LXD-uid and its like
	DirMode         uint32 // of a directory that is made without a mode
	OctalMode       bool   // "644" is octal; otherwise only "0644" is
	ModifyPerm      bool   // X-LXD-modify-perm
	RemoveNamed     bool   // errors of DELETE say what was to be removed
	ForceDelete     bool   // X-Incus-force deletes trees
	HeadLength      bool   // HEAD tells a file's length
	StrictHeaders   bool   // uid, gid and mode that are no numbers are refused
	StaleLength     bool   // the refusal of a Range has the file's length, and so no end
	SFTPPacket      int    // bytes of data in one reply, at most
	SFTPOpenMode    bool   // the mode that a client gives with OPEN counts
	SFTPSetuid      bool   // setuid, setgid and sticky can be set over SFTP
	SFTPBlocksStops bool   // a forced stop waits for open SFTP sessions
	SilenceBlocks   bool   // on a unix socket nobody else is accepted before a connection's first 8 bytes have come
	SFTPShared      bool   // a packet that makes no sense ends all SFTP sessions of its instance

	Texts Texts
}

// Texts are the error texts in which the releases differ. {name}, {project} and {path}
// are replaced.
type Texts struct {
	NotFound         string // no such address
	Forbidden        string // an untrusted client
	InstanceNotFound string
	ProjectNotFound  string
	FileNotFound     string
	NoPID            string // an exec without a command
	FileType         string // {value}: an unknown type of file
	WriteMode        string // {value}
	AgentDown        string
}

// A Refusal is the status and the text of an error.
type Refusal struct {
	Status int
	Text   string
}

// WaitStyle is how GET /1.0/operations/ID/wait tells a failed operation and the
// end of its timeout.
type WaitStyle int

const (
	WaitPlain     WaitStyle = iota // status 200 with the operation, whatever became of it
	WaitHTTPError                  // an error with the operation's status
	WaitErrorBody                  // status 200 at once, an error in the body, and no operation
	WaitEarly                      // status 200 at once, later the operation, whatever became of it
)

// DeleteStyle is what DELETE does to the operation of a running exec.
type DeleteStyle int

const (
	DeleteRefused DeleteStyle = iota // 400
	DeleteKills                      // the process is killed, the operation succeeds with 137
	DeleteCancels                    // the process is killed, the operation is cancelled and has no return code
)

// The releases that were watched. None of them is changed by this package; set
// [Server.Version] to one of them or to a changed copy.
var (
	// LXD50 is LXD 5.0.2, what Debian 12 has. It is the default.
	LXD50 = Version{
		Name: "LXD 5.0.2", Server: "lxd", Release: "5.0.2", Extensions: slices.Clone(baseExtensions),
		ConnectWindow: 5 * time.Second, StartDelay: 15 * time.Millisecond, PingInterval: 10 * time.Second, OperationLifetime: 5 * time.Second,
		StallTimeout: 2 * time.Minute,
		PingPayload:  "keepalive", PingOnUnix: true, MessageMax: 64 << 10, StdinWhole: true, InputHangsUp: true,
		Wait: WaitPlain, BadSecret: Refusal{500, "permission denied"}, MissingSecret: "missing secret",
		OldResources: true, ContainersAlias: true, BadEventType: 500, FailedStatus: true, Executable: "/usr/bin/lxd", VMLost: -1,
		HeaderPrefix: "X-LXD-", DirMode: 0o750, StaleLength: true, SFTPPacket: 32 << 10, SFTPBlocksStops: true, SFTPShared: true, SilenceBlocks: true,
		Texts: Texts{
			NotFound: "not found", Forbidden: "not authorized", InstanceNotFound: "Instance not found", ProjectNotFound: "Instance not found",
			FileNotFound: "Not Found", NoPID: "Failed to retrieve PID of executing child process",
			FileType: "Bad file type: {value}", WriteMode: "Bad file write mode: {value}", AgentDown: "LXD VM agent isn't currently running",
		},
	}

	// LXD521 is LXD 5.21.7, the last release of the 5.21 series.
	LXD521 = derive(LXD50, func(v *Version) {
		v.Name, v.Release = "LXD 5.21.7", "5.21.7"
		v.Extensions = extended(baseExtensions,
			"operations_get_query_all_projects", "operation_wait", "instances_files_modify_permissions", "oidc",
			"explicit_trust_token", "access_management_tls", "operation_requestor",
		)
		v.ChildGrace = time.Second
		v.PingPayload, v.PingOnUnix, v.MessageMax, v.StdinWhole, v.ReadsStderr = "", false, 32<<10, false, true
		v.DuplicateBug, v.InputHangsUp = true, false
		v.Wait, v.BadSecret, v.MissingSecret = WaitErrorBody, Refusal{403, "Forbidden"}, "Missing websocket secret"
		v.RequestorCheck, v.Requestor, v.OldResources = "Operation requestor mismatch", true, false
		v.StrictRecording, v.ExecOutputDir, v.VMLost = true, true, 129
		v.ModifyPerm, v.HeadLength, v.StrictHeaders, v.SFTPSetuid, v.SFTPBlocksStops, v.SFTPShared, v.SilenceBlocks = true, true, true, true, false, false, false
		v.SFTPOpenMode, v.StaleLength = true, false
		v.Texts.NotFound, v.Texts.Forbidden, v.Texts.ProjectNotFound = "Not Found", "Forbidden", "Project not found"
		v.Texts.FileType, v.Texts.WriteMode = `Invalid file type: "{value}"`, `Invalid file write mode: "{value}"`
		v.Texts.AgentDown = "LXD VM agent is not currently running"
	})

	// LXD6 is LXD 6.9.
	LXD6 = derive(LXD521, func(v *Version) {
		v.Name, v.Release = "LXD 6.9", "6.9"
		v.Extensions = extended(v.Extensions,
			"auth_oidc_sessions", "operation_metadata_entity_url", "auth_bearer", "bulk_operations",
		)
		v.ConnectWindow = 10 * time.Second
		v.CheckOrigin, v.DuplicateBug, v.FinishedOwnCode = true, false, true
		v.Delete, v.ErrCode, v.EntityURL, v.UUIDv7, v.ContainersAlias = DeleteKills, true, true, true, false
		v.Texts.InstanceNotFound = `Failed fetching instance "{name}" in project "{project}": Instance not found`
		v.Texts.FileNotFound = `Failed accessing "{path}" in instance "{name}": file does not exist`
		v.Texts.NoPID = "Failed retrieving PID of executing child process"
	})

	// Incus6 is Incus 6.0.4 as Debian 13 has it.
	Incus6 = derive(LXD521, func(v *Version) {
		v.Name, v.Server, v.Release = "Incus 6.0.4", "incus", "6.0.4"
		v.Extensions = extended(baseExtensions, "operations_get_query_all_projects", "operation_wait", "oidc", "auth_tls_jwt")
		v.PingPayload, v.PingOnUnix, v.DuplicateBug = "keepalive", true, false
		v.RequestorCheck, v.Requestor, v.ContainersAlias, v.NoContainers = "Requestor mismatch", false, false, true
		v.HeaderPrefix, v.DirMode, v.ModifyPerm, v.StrictHeaders = "X-Incus-", 0o755, false, false
		v.HideSecrets, v.SFTPOpenMode, v.SFTPSetuid, v.SFTPShared = true, false, false, true
		v.EmptyMetadata, v.EventDetails, v.BadEventType, v.StrictPaths, v.LateAlias, v.CopyProfiles = true, true, 400, true, true, true
		v.Executable, v.Texts.NotFound = "/usr/libexec/incus/incusd", "not found"
		v.Texts.InstanceNotFound = `Failed to fetch instance "{name}" in project "{project}": Instance not found`
		v.Texts.FileType, v.Texts.WriteMode = "Bad file type: {value}", "Bad file write mode: {value}"
		v.Texts.AgentDown = "VM agent isn't currently running"
	})

	// Incus7 is Incus 7.0.2 as Debian has it.
	Incus7 = derive(Incus6, func(v *Version) {
		v.Name, v.Release = "Incus 7.0.2", "7.0.2"
		v.Extensions = extended(v.Extensions, "custom_volume_sftp", "file_storage_volume", "file_delete_force", "core_https_allowed_websocket_origin")
		v.ConnectWindow, v.ControlMax, v.CheckOrigin = 10*time.Second, 32<<10, true
		v.Wait, v.Delete = WaitEarly, DeleteCancels
		v.OctalMode, v.ForceDelete, v.SFTPPacket = true, true, 128<<10
		v.SFTPOpenMode, v.CancelUntilEnd, v.OneLineErrors, v.EarlyDuplicate, v.RemoveNamed = true, true, true, true, true
		v.StrictPaths = false
	})
)

// Versions are the five releases, oldest first.
func Versions() []Version { return []Version{LXD50, LXD521, LXD6, Incus6, Incus7} }

//go:embed extensions.txt
var extensionList string

// baseExtensions is what LXD 5.0.2 lists.
var baseExtensions = strings.Fields(extensionList)

func extended(list []string, more ...string) []string { return append(slices.Clone(list), more...) }

func derive(v Version, change func(*Version)) Version {
	v.Extensions = slices.Clone(v.Extensions)
	change(&v)
	return v
}
