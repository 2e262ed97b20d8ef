package transport_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/lxdtransport/transport"

// row says what the files of a folder may import besides the standard library. A path stands for what is below it, too.
type row struct {
	folder  string
	files   []string // nil: all that no other row names
	imports []string
	tests   []string // its tests, besides
	free    bool     // everything
}

var (
	lxdClient = []string{"github.com/canonical/lxd/client", "github.com/canonical/lxd/shared/api"}
	testing_  = []string{"github.com/stretchr/testify", "go.uber.org/goleak"}
)

// table is the architecture: who may import whom. A folder without a row is an error.
var table = []row{
	{folder: ".", files: []string{"panic.go", "transport.go", "tree.go", "tree_busybox.go", "tree_pipe.go", "tree_single.go", "tree_sink.go", "tree_source.go", "tree_tar.go",
		"tree_unchanged.go"}},
	{folder: ".", imports: append(lxdClient, module+"/internal", "github.com/gorilla/websocket", "github.com/pkg/sftp"), tests: append(testing_, module, module+"/lxdtest", module+"/transporttest")},
	{folder: "internal/sftp", tests: append(testing_, "github.com/pkg/sftp")},
	{folder: "internal/clientconfig", imports: []string{"go.yaml.in/yaml/v2"}},
	{folder: "internal/reallxd", imports: lxdClient},
	{folder: "internal/sshd"},
	{folder: "internal/bench", free: true},
	{folder: "internal/soak", free: true},
	{folder: "lxdtest", imports: []string{"github.com/gorilla/websocket", "github.com/pkg/sftp"}, tests: append(append(testing_, lxdClient...), module+"/lxdtest", module+"/internal/reallxd")},
	{folder: "transporttest", imports: []string{module, "github.com/stretchr/testify"}, tests: append(testing_, module+"/local", module+"/transporttest")},
	{folder: "local", imports: []string{module}, tests: append(testing_, module+"/transporttest", module+"/local")},
	{folder: "ssh", imports: []string{module, "golang.org/x/crypto", "github.com/pkg/sftp"}, tests: append(testing_, module+"/transporttest", module+"/ssh", module+"/internal/sshd")},
	{folder: "builder/lxd", imports: append(lxdClient, module+"/builder"), tests: append(testing_, module+"/lxdtest", module+"/internal/reallxd", module+"/builder/lxd")},
	{folder: "builder", tests: testing_},
	{folder: "provisioner", imports: []string{module}, tests: append(append(testing_, lxdClient...), module+"/local", module+"/provisioner", module+"/builder", module+"/internal/reallxd")},
	{folder: "job", imports: []string{module, module + "/builder", module + "/provisioner", "go.yaml.in/yaml/v3"}, tests: append(append(testing_, lxdClient...), module+"/job", module+"/local", module+"/lxdtest", module+"/ssh", module+"/internal/reallxd", module+"/internal/sshd")},
	{folder: "cmd", free: true},
	{folder: "examples", free: true},
}

// TestImports reads the sources itself, so that no change of them is hidden by a cached result.
func TestImports(t *testing.T) {
	t.Parallel()
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		require.NoError(t, err)
		if d.IsDir() {
			base := d.Name()
			_, statErr := os.Stat(filepath.Join(name, "go.mod"))
			if base == "testdata" || base == "vendor" || name != "." && (strings.HasPrefix(base, ".") || statErr == nil) {
				return filepath.SkipDir
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		name = filepath.ToSlash(name)
		r := rowOf(name)
		if r == nil {
			t.Errorf("%s: its folder has no row in the table: decide what it may import", name)
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, spec := range f.Imports {
			what, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			allowed := r.imports
			if strings.HasSuffix(name, "_test.go") {
				allowed = append(slices.Clone(allowed), r.tests...)
			}
			if !r.free && !standard(what) && !slices.ContainsFunc(allowed, func(a string) bool { return below(what, a) }) {
				t.Errorf("%s imports %s, which the architecture does not allow", name, what)
			}
		}
		return nil
	})
	require.NoError(t, err)
}

func rowOf(file string) *row {
	var found *row
	for i, r := range table {
		switch {
		case r.folder == "." && path.Dir(file) != ".", r.folder != "." && !below(path.Dir(file), r.folder):
		case r.files == nil && found == nil, slices.Contains(r.files, path.Base(file)):
			found = &table[i]
		}
	}
	return found
}

// below reports whether a path is the allowed one or below it. This module's root does not stand for its folders.
func below(what, allowed string) bool {
	return what == allowed || allowed != module && strings.HasPrefix(what, allowed+"/")
}

// standard reports whether a package is of the standard library: those have no dot in their first element.
func standard(what string) bool {
	first, _, _ := strings.Cut(what, "/")
	return !strings.Contains(first, ".")
}

func TestImportTableBites(t *testing.T) {
	t.Parallel()
	require.Nil(t, rowOf("newfolder/x.go"))
	require.Empty(t, rowOf("transport.go").imports)
	require.NotEmpty(t, rowOf("exec.go").imports)
	require.True(t, rowOf("examples/build/main.go").free)
	require.False(t, standard("golang.org/x/sys"))
	require.False(t, below("github.com/canonical/lxd/client2", "github.com/canonical/lxd/client"))
}
