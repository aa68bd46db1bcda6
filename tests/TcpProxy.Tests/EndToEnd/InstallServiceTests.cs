using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--install-service: systemd's own tools judge the unit.</summary>
public sealed class InstallServiceTests : EndToEndTest
{
    [Fact(Timeout = Quick)]
    public async Task The_unit_is_valid_and_well_hardened()
    {
        string analyze = Tool.Need("systemd-analyze", "systemd");
        string unit = await Unit("127.0.0.1:8080", "echo", "--log-file", "/var/log/tcpproxy/log", "--pid-file", "/run/tcpproxy/pid");
        Outcome verified = await Tool.Run(analyze, "verify", "--man=no", unit);
        Assert.Equal((0, string.Empty), (verified.Status, verified.Err));
        string score = (await Tool.Run(analyze, "security", "--offline=yes", "--no-pager", unit)).Good();
        Match level = Regex.Match(score, @"Overall exposure level for \S+: (\d+\.\d)");
        TestContext.Current.TestOutputHelper?.WriteLine(level.Value);
        Assert.True(double.Parse(level.Groups[1].Value, CultureInfo.InvariantCulture) <= 1.6, level.Value);
        string text = File.ReadAllText(unit);
        Assert.Contains("\nLogsDirectory=tcpproxy\n", text, StringComparison.Ordinal);
        Assert.Contains("\nRuntimeDirectory=tcpproxy\n", text, StringComparison.Ordinal);
        Assert.Contains("\nDynamicUser=yes\n", text, StringComparison.Ordinal);
        Assert.Contains("\nCapabilityBoundingSet=\n", text, StringComparison.Ordinal);
        Assert.DoesNotContain("WorkingDirectory", text, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Rights_follow_from_what_is_asked_for()
    {
        Tool.NeedLibc("--user");
        string low = File.ReadAllText(await Unit(":80", "echo", "--user", "www-data:adm", "--drain-timeout", "2m"));
        Assert.Contains("\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n", low, StringComparison.Ordinal);
        Assert.Contains("\nUser=www-data\nGroup=adm\n", low, StringComparison.Ordinal);
        Assert.DoesNotContain("DynamicUser", low, StringComparison.Ordinal);
        Assert.Contains("\nTimeoutStopSec=125s\n", low, StringComparison.Ordinal);

        Assert.Contains("\nAmbientCapabilities=CAP_NET_BIND_SERVICE\n",
            File.ReadAllText(await Unit("127.0.0.1:8080", "echo", "--stats", "81")), StringComparison.Ordinal);

        // DynamicUser makes /tmp private whatever PrivateTmp says
        foreach (string[] words in new string[][] { ["unix:/tmp/front", "echo"], ["127.0.0.1:8080", "unix:/tmp/mysql.sock"] })
        {
            string temporary = File.ReadAllText(await Unit(words));
            Assert.Contains("\nUser=nobody\n", temporary, StringComparison.Ordinal);
            Assert.Contains("\nPrivateTmp=no\n", temporary, StringComparison.Ordinal);
            Assert.DoesNotContain("DynamicUser", temporary, StringComparison.Ordinal);
        }

        Assert.Contains("\nSockets=tcpproxy.socket\nNonBlocking=yes\n",
            File.ReadAllText(await Unit("127.0.0.1:8080", "echo", "--control", "fd:ctl")), StringComparison.Ordinal);
        string watched = File.ReadAllText(await Unit("127.0.0.1:8080", "echo", "--stats", "unix:/run/tcpproxy/stats"));
        Assert.Contains("\nRuntimeDirectory=tcpproxy\n", watched, StringComparison.Ordinal);
        Assert.Contains("\nUMask=0007\n", watched, StringComparison.Ordinal);

        string activated = File.ReadAllText(await Unit("fd:web", "echo", "--drain-timeout", "off"));
        Assert.Contains("\nRequires=tcpproxy.socket\n", activated, StringComparison.Ordinal);
        Assert.Contains("\nSockets=tcpproxy.socket\nNonBlocking=yes\n", activated, StringComparison.Ordinal);
        Assert.Contains("\nTimeoutStopSec=infinity\n", activated, StringComparison.Ordinal);

        string unix = File.ReadAllText(await Unit("unix:/run/web/front", "echo", "--record", "/srv/flows"));
        Assert.Contains("\nReadWritePaths=-/srv/flows\nRuntimeDirectory=web\n", unix, StringComparison.Ordinal);
        Assert.Contains("\nUMask=0007\n", unix, StringComparison.Ordinal);

        File.WriteAllText(Given.Path("a.conf"), "listen 127.0.0.1:0\nupstream echo\npid-file pid\n");
        string relative = File.ReadAllText(await Unit("-c", "a.conf"));
        Assert.Contains($"\nWorkingDirectory={Given.Folder}\n", relative, StringComparison.Ordinal);
        Assert.Contains($"\nReadWritePaths=-{Given.Folder}\n", relative, StringComparison.Ordinal);
        Assert.Contains("\nPrivateTmp=no\n", relative, StringComparison.Ordinal);
        Assert.Contains(
            $"\nExecReload={ProxyProcess.Binary} --check-config -c a.conf\nExecReload=/bin/kill -HUP $MAINPID\n",
            relative, StringComparison.Ordinal);

        File.WriteAllText(Given.Path("list"), "192.0.2.0/24\n");
        string listed = File.ReadAllText(await Unit("127.0.0.1:0", "echo", "--deny", "@list"));
        Assert.Contains(
            $"\nExecReload={ProxyProcess.Binary} --check-config 127.0.0.1:0 echo --deny @list\n", listed, StringComparison.Ordinal);
        Assert.DoesNotContain("--check-config", unix, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Filters_may_be_compilers()
    {
        Tool.NeedLibc("filters");
        string unit = File.ReadAllText(await Unit("127.0.0.1:0", "echo", "--filter-up", "cat"));
        Assert.DoesNotContain("MemoryDenyWriteExecute", unit, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task Words_survive_systemds_quoting()
    {
        string systemd = "/lib/systemd/systemd";
        Assert.SkipUnless(File.Exists(systemd), "systemd not found: apt-get install systemd");
        string[] names =
        [
            "plain", "two words", "", "a\"b", "a'b", "back\\slash\\", "$HOME", "${HOME}", "100%", "%n%i", "tab\tand\nline", ";",
            "#no comment", "\u00fc\u20ac", "a=b", "-x", "@y", "*", "~", "`id`", "\\x41",
        ];
        List<string> words = ["127.0.0.1:0", "echo"];
        foreach (string name in names.Where(n => n.Length > 0))
        {
            words.AddRange(["-l", "127.0.0.1:0", "-u", "echo", $"--name={name}"]);
        }

        string exec = File.ReadLines(await Unit([.. words[2..]])).First(l => l.StartsWith("ExecStart=", StringComparison.Ordinal));
        string[] read = [.. Read(exec["ExecStart=".Length..])];
        Assert.Equal([ProxyProcess.Binary, .. words[2..]], read);
    }

    [Fact]
    public void Words_survive_Windows_quoting()
    {
        string[] words = ["a", "two words", "", "a\"b", "\\\\server\\share dir\\", "tail\\", "\\\"", "x\\\\\"y z\\\\"];
        string line = ServiceText.Windows("C:\\Program Files\\tcpproxy.exe", words);
        Assert.EndsWith("\n", line, StringComparison.Ordinal);
        string[] outer = SplitAsWindows(line.TrimEnd('\n'));
        Assert.Equal(["sc.exe", "create", "tcpproxy", "start=", "auto", "obj=", "NT AUTHORITY\\LocalService", "binPath="], outer[..8]);
        Assert.Equal(["C:\\Program Files\\tcpproxy.exe", .. words], SplitAsWindows(Assert.Single(outer[8..])));
    }

    [Fact(Timeout = Quick)]
    public async Task A_wrong_command_line_makes_no_unit()
    {
        Outcome outcome = await Tool.Proxy("127.0.0.1:0", "--install-service");
        Assert.Equal((2, string.Empty), (outcome.Status, outcome.Out));
    }

    /// <summary>The unit of this command line, in a file.</summary>
    private async Task<string> Unit(params string[] words)
    {
        Outcome outcome = await Tool.Run(ProxyProcess.Binary, [.. words, "--install-service"], 20, Given.Folder);
        return Given.Write("tcpproxy.service", outcome.Good());
    }

    /// <summary>systemd.service(5) and systemd.syntax(7), by the letter: quotes, escapes, then specifiers, then variables.</summary>
    private static IEnumerable<string> Read(string line)
    {
        for (int i = 0; i < line.Length; i++)
        {
            StringBuilder word = new();
            bool quoted = line[i] == '"';
            i += quoted ? 1 : 0;
            for (; quoted ? line[i] != '"' : i < line.Length && line[i] != ' '; i++)
            {
                if (line[i] == '\\')
                {
                    i++;
                    word.Append(line[i] == 'x' ? (char)Convert.ToInt32(line.Substring(i + 1, 2), 16) : line[i]);
                    i += line[i] == 'x' ? 2 : 0;
                }
                else
                {
                    Assert.False(!quoted && line[i] is '\'' or '#' or ';', $"unquoted {line[i]}");
                    word.Append(line[i]);
                }
            }

            i += quoted ? 1 : 0;
            string text = word.ToString();
            Assert.DoesNotMatch("(?<!%)(%%)*%(?!%)", text);
            Assert.DoesNotMatch(@"(?<!\$)(\$\$)*\$(?!\$)", text);
            yield return text.Replace("%%", "%", StringComparison.Ordinal).Replace("$$", "$", StringComparison.Ordinal);
        }
    }

    /// <summary>CommandLineToArgvW.</summary>
    private static string[] SplitAsWindows(string line)
    {
        List<string> words = [];
        int i = 0;
        while (i < line.Length)
        {
            StringBuilder word = new();
            bool quoted = false;
            for (; i < line.Length && (quoted || line[i] != ' '); i++)
            {
                int backslashes = 0;
                for (; i < line.Length && line[i] == '\\'; i++)
                {
                    backslashes++;
                }

                bool quote = i < line.Length && line[i] == '"';
                word.Append('\\', quote ? backslashes / 2 : backslashes);
                if (quote && backslashes % 2 == 0)
                {
                    quoted = !quoted;
                }
                else if (quote)
                {
                    word.Append('"');
                }
                else if (i < line.Length && (quoted || line[i] != ' '))
                {
                    word.Append(line[i]);
                }
                else
                {
                    i--;
                }
            }

            words.Add(word.ToString());
            i++;
        }

        return [.. words];
    }
}
