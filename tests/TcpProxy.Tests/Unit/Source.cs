using System.IO;
using System.Runtime.CompilerServices;

namespace TcpProxy.Tests;

/// <summary>The project's own files, found from this one.</summary>
internal static class Source
{
    internal static string Program { get; } = Read("TcpProxy.cs");

    internal static string ReadMe { get; } = Read("README.md");

    internal static string PathOf(string name) => Path.GetFullPath(Path.Combine(Here(), "..", "..", "..", name));

    private static string Read(string name) => File.ReadAllText(PathOf(name));

    private static string Here([CallerFilePath] string file = "") => Path.GetDirectoryName(file)!;
}
